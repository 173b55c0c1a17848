"""Launch many runs: one after the other in this process, or as tasks of a Ray cluster."""

from __future__ import annotations

import sys
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from odeadv import data
from odeadv.evaluation.protocols import require_packages
from odeadv.experiments._config import RunConfig
from odeadv.experiments._folder import RunLockedError
from odeadv.experiments._presets import Preset, configurations
from odeadv.experiments._records import Record
from odeadv.experiments._run import Measurement, run
from odeadv.experiments._tables import Table
from odeadv.support.extras import extra
from odeadv.support.files import check_folder, write_json
from odeadv.training import make_fabric

Launcher = Literal["local", "ray"]


@dataclass(frozen=True)
class Job:
    """A run and the protocols of its evaluation.

    Attributes:
        config: configuration of the run.
        protocols: protocols of `odeadv.evaluate`, see `run`.
    """

    config: RunConfig
    protocols: tuple[str | Measurement, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A job that failed.

    Attributes:
        job: the job.
        reason: message of the error.
    """

    job: Job
    reason: str


def launch(
    jobs: Sequence[Job],
    runs: Path,
    folder: Path | None = None,
    *,
    launcher: Launcher = "local",
    cpus: int = 1,
    gpus: float = 0.0,
    log: TextIO | None = None,
    tensorboard: bool = False,
    accelerator: str = "auto",
    pause: float = 10.0,
) -> tuple[list[Record], list[Failure]]:
    """Run all ``jobs``. If one job fails, the others still run.

    Several processes can get the same jobs, for example one process per core or GPU. Each process takes runs that no
    other process has. At the end it waits for the runs of the other processes.

    Args:
        jobs: jobs to run. A finished run is not repeated.
        runs: folder of all runs. If Ray uses several machines, all machines must have access to this folder.
        folder: folder with (or for) the data sets.
        launcher: ``"local"`` runs the jobs one after the other in this process. ``"ray"`` runs as many jobs at a time
            as the cluster has resources for (needs the extra ``ray``).
        cpus: CPUs that Ray reserves per run, and the number of threads of the run.
        gpus: GPUs that Ray reserves per run.
        log: stream for the progress; standard error if not given.
        tensorboard: True to also write event files for TensorBoard.
        accelerator: accelerator of lightning-fabric.
        pause: seconds between two tries to take the remaining runs, if other processes have all of them.

    Returns:
        The records of the finished runs, in the order of ``jobs``, and the failures.

    Raises:
        ValueError: if the launcher is unknown or not installed.
        DatasetNotFoundError: if a data set is missing.
    """
    if launcher not in ("local", "ray"):
        raise ValueError(f"launcher: got {launcher!r}, expected 'local' or 'ray'")
    loaded = {name: data.load(name, folder) for name in dict.fromkeys(job.config.data.name for job in jobs)}
    log = log or sys.stderr
    if launcher == "ray":
        return _on_ray(jobs, runs, folder, cpus, gpus, log)
    results: dict[int, Record | Failure] = {}
    waiting, elsewhere = deque(enumerate(jobs)), set[int]()
    in_a_row = 0
    while waiting:
        number, job = waiting.popleft()
        label = f"[{number + 1}/{len(jobs)} {_named(job.config)}]"
        try:
            fabric = make_fabric(precision=job.config.training.precision, accelerator=accelerator)
            fabric.launch()
            images = loaded[job.config.data.name]
            results[number] = run(
                job.config, images, runs, protocols=job.protocols, label=label, log=log, tensorboard=tensorboard,
                fabric=fabric,
            )  # fmt: skip
            in_a_row = 0
        except Exception as error:  # one failure of any kind must not stop the later runs
            if isinstance(error, RunLockedError) and fabric.world_size == 1:
                if number not in elsewhere:
                    print(f"{label} is run by another process, others first", file=log, flush=True)
                elsewhere.add(number)
                waiting.append((number, job))
                in_a_row += 1
                time.sleep(pause if in_a_row >= len(waiting) else 0.0)
                continue
            results[number] = Failure(job, str(error) or type(error).__name__)
            print(f"{label} failed: {error}", file=log, flush=True)
    return _sorted(results)


def _named(config: RunConfig) -> str:
    eta = getattr(config.training.defence, "eta", 0.0)
    return f"{config.method}{f', eta {eta:g}' if eta else ''}, seed {config.training.seed}"


def _sorted(results: Mapping[int, Record | Failure]) -> tuple[list[Record], list[Failure]]:
    """Return the records and the failures, each in the order of the jobs."""
    inorder = [results[number] for number in sorted(results)]
    failures = [found for found in inorder if isinstance(found, Failure)]
    return [found for found in inorder if not isinstance(found, Failure)], failures


def _on_ray(
    jobs: Sequence[Job], runs: Path, folder: Path | None, cpus: int, gpus: float, log: TextIO
) -> tuple[list[Record], list[Failure]]:
    with extra("ray"):
        import ray
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_one)
    where = runs.resolve(), None if folder is None else Path(folder).resolve()
    waiting = {task.remote(job, *where, cpus): number for number, job in enumerate(jobs)}
    results: dict[int, Record | Failure] = {}
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1)
        number = waiting.pop(done[0])
        job = jobs[number]
        try:
            results[number] = ray.get(done[0])
            how = "finished"
        except Exception as error:  # a worker can raise any error
            cause = getattr(error, "cause", None) or error
            results[number] = Failure(job, str(cause))
            how = f"failed: {cause}"
        print(f"[{len(results)}/{len(jobs)}] {job.config.name} {how}", file=log, flush=True)
    return _sorted(results)


def _one(job: Job, runs: Path, folder: Path | None, threads: int) -> Record:
    """Run one job in a worker and write its progress to ``log.txt`` in the folder of the run."""
    import torch

    torch.set_num_threads(max(1, threads))
    images = data.load(job.config.data.name, folder)
    (runs / job.config.name).mkdir(parents=True, exist_ok=True)
    with (runs / job.config.name / "log.txt").open("a", encoding="utf-8") as log:
        return run(job.config, images, runs, protocols=job.protocols, log=log)


def first_process() -> bool:
    """Return True if this is the only process, or the first of several processes that train one run together."""
    fabric = make_fabric()
    fabric.launch()
    return bool(fabric.is_global_zero)


def make_table(
    table: Table,
    preset: Preset,
    *,
    dataset: str | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    runs: Path = Path("runs"),
    out: Path,
    folder: Path | None = None,
    best: bool = True,
    autoattack: int | None = None,
    launcher: Launcher = "local",
    cpus: int = 1,
    gpus: float = 0.0,
) -> tuple[list[Failure], bool]:
    """Make the missing runs of a table and copy the records to ``out``; `write_report` makes the page from them.

    Args:
        table: table to make.
        preset: size of the runs.
        dataset: name of the data set; the preset's if None.
        methods: names of the rows to run; all rows if None.
        seeds: seeds of the runs; the preset's if None.
        runs: folder of all runs.
        out: folder for the records.
        folder: folder with the data sets.
        best: True to evaluate the weights of the best epoch in addition to the last weights.
        autoattack: number of test images for AutoAttack; None for a table without AutoAttack.
        launcher: as for `launch`.
        cpus: as for `launch`.
        gpus: as for `launch`.

    Returns:
        The failures, and True if this process is the first process. Only the first process writes the records.

    Raises:
        ValueError, OSError, ImportError: if an argument is wrong, or a file or package is missing. The error is raised
            before any run starts.
    """
    pairs = configurations(table, preset, dataset=dataset, methods=methods, seeds=seeds)
    check_folder("out", out)
    check_folder("runs", runs)
    protocols: tuple[str | Measurement, ...] = (Measurement(table.protocol, best=best),)
    if autoattack is not None:
        protocols = (*protocols, Measurement(table.autoattack, autoattack, best=False))
        require_packages(table.autoattack)
    jobs = [Job(config, protocols) for _, config in pairs]
    with warnings.catch_warnings():  # presets choose eta for their batch size, and the page reports it
        warnings.filterwarnings("ignore", message=r"eta: .* is for the mean over batches")
        records, failures = launch(jobs, runs, folder, launcher=launcher, cpus=cpus, gpus=gpus)
    first = first_process()
    if first:
        ended = [job for job in jobs if job not in [failure.job for failure in failures]]
        for record, job in zip(records, ended, strict=True):
            write_json(out / f"{job.config.name}.json", record)
    return failures, first
