"""The campaign that tests the paper's claims: its stages as data, in the order of the runs.

docs/results/rules.md states the decision rules. The rules were written before the runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from odeadv.experiments._presets import PRESETS, configurations
from odeadv.experiments._tables import TABLES
from odeadv.support.files import write_json

from ._launch import Failure, Job, launch
from ._records import load_record
from ._run import Measurement, measurements


@dataclass(frozen=True)
class CampaignStage:
    """One stage of the campaign.

    Attributes:
        name: name of the stage in docs/results/rules.md.
        table, preset: names of the table and the preset. The data set is CIFAR-10.
        seeds: seeds of the runs. Earlier results have not used them, except for ``rows`` that continue a committed
            table.
        rows: names of some rows of the table; if empty, all rows.
        without: rows and seeds that are left out, because the row was added after a run of this seed was seen.
        best: True if the weights of the best epoch are evaluated in addition to the last weights.
        says: the question that the stage decides.
    """

    name: str
    table: str
    preset: str
    seeds: tuple[int, ...]
    rows: tuple[str, ...] = ()
    without: tuple[tuple[str, int], ...] = ()
    best: bool = True
    says: str = ""

    @property
    def jobs(self) -> list[Job]:
        """The runs of the stage: all rows of the first seed, then all rows of the next seed."""
        table = TABLES[self.table]
        pairs = configurations(
            table, PRESETS[self.preset], dataset="cifar10", methods=self.rows or None, seeds=self.seeds
        )
        return [
            Job(config, (Measurement(table.protocol, best=self.best),))
            for row, config in pairs
            if (row.name, config.training.seed) not in self.without
        ]


#: The stages of the campaign, by name: one `CampaignStage` each.
STAGES = {
    stage.name: stage
    for stage in (
        CampaignStage(
            "2a", "mechanism", "mlp", tuple(range(10, 20)), without=(("pgd+lad+input@6:wd0.02", 10),),
            says="the mechanism: is LAD a gradient penalty?",
        ),
        CampaignStage("4", "mechanism-eta", "mlp", tuple(range(10, 15)), says="the shape of Table 5"),
        CampaignStage(
            "1", "ablations", "cpu", tuple(range(3, 10)),
            (
                "natural", "natural+lad", "natural+lad-sm", "natural+lad-sm+random", "natural+matched",
                "natural+lad+input", "natural+lad-symmetric",
            ),
            best=False, says="Table 1: LAD, LAD-SM, their order, direction, layers, equal compute",
        ),
        CampaignStage("2b", "mechanism-conv", "overfit", (10, 11), ("pgd",), says="whether the ConvNet over-fits"),
        CampaignStage(
            "2d", "mechanism-conv", "overfit", tuple(range(10, 18)), TABLES["mechanism-conv"].methods[1:],
            without=(("pgd+lad+input@1.5:wd0.02", 10),),
            says="Table 2 on a ConvNet; pilots chose eta and weight decay on validation images",
        ),
        CampaignStage(
            "3", "mechanism-trades", "mlp", tuple(range(10, 16)),
            says="Table 3: LAD minus the mix of losses alone",
        ),
        CampaignStage(
            "1-mlp", "mechanism-natural", "mlp", tuple(range(10, 20)), best=False,
            says="Table 1 on a residual MLP",
        ),
        CampaignStage(
            "1-eta", "mechanism-natural-eta", "overfit", tuple(range(10, 14)), best=False,
            says="natural training of a ConvNet at a small weight decay: does a larger eta help?",
        ),
        CampaignStage(
            "noise", "mechanism-noise", "overfit", (10, 11, 12, 13), TABLES["mechanism-noise"].methods[1:],
            says="Table 4 on a ConvNet: noise with LAD-SM",
        ),
        CampaignStage(
            "steps", "mechanism-steps", "mlp", (20, 21, 22), best=False, says="Table 6: attacks of up to 1000 steps",
        ),
        CampaignStage(
            "1-conv", "mechanism-natural-conv", "overfit", tuple(range(10, 18)), best=False,
            says="Table 1 on a ConvNet",
        ),
    )
}  # fmt: skip


def planned(table: str, preset: str, row: str) -> set[int] | None:
    """Return the seeds for which the campaign plans ``row``; None if no stage runs ``table`` at ``preset``."""
    stages = [stage for stage in STAGES.values() if (stage.table, stage.preset) == (table, preset)]
    if not stages:
        return None
    return {
        seed
        for stage in stages
        for seed in stage.seeds
        if row in (stage.rows or TABLES[table].methods) and (row, seed) not in stage.without
    }


def run_stage(
    stage: CampaignStage, runs: Path, folder: Path, records: Path, seeds: Sequence[int] | None = None
) -> list[Failure]:
    """Run the missing runs of ``stage``, seed by seed, and copy the records when a seed is finished.

    If the stage is stopped, call this function again. It skips runs that have a record and resumes a run from its
    checkpoint. A record that lacks an evaluation of the stage is left as it is, and its run is reported as failed.

    Args:
        stage: one of `STAGES`.
        runs: folder of all runs, with weights and checkpoints.
        folder: folder with the data sets.
        records: folder to which one JSON file per run is written.
        seeds: some of the stage's seeds; None for all.

    Returns:
        The runs that failed.

    Raises:
        ValueError: if one of ``seeds`` does not belong to the stage.
    """
    chosen = stage.seeds if seeds is None else tuple(seeds)
    if unknown := [seed for seed in chosen if seed not in stage.seeds]:
        raise ValueError(f"seeds: got {unknown}, expected some of {list(stage.seeds)}")
    failed: list[Failure] = []
    for seed in chosen:
        jobs = []
        for job in stage.jobs:
            path = records / f"{job.config.name}.json"
            if job.config.training.seed != seed:
                continue
            if not path.exists():
                jobs.append(job)
            elif lacking := [each.key for each in measurements(job.protocols) if not each.made(load_record(path))]:
                reason = f"{path}: lacks the evaluation {', '.join(lacking)}; move the file away to run it again"
                failed.append(Failure(job, reason))
        print(f"stage {stage.name}, seed {seed}: {len(jobs)} runs", file=sys.stderr, flush=True)
        found, failures = launch(jobs, runs, folder)
        failed += failures
        ended = [job for job in jobs if job not in [failure.job for failure in failures]]
        for record, job in zip(found, ended, strict=True):
            write_json(records / f"{job.config.name}.json", record)
    return failed
