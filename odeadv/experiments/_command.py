"""The command that makes a table: what ``examples/tableN.py`` and ``odeadv table`` run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from odeadv import data
from odeadv.evaluation.protocols import require_packages
from odeadv.experiments._config import RunConfig
from odeadv.experiments._cost import rehearse, training_passes
from odeadv.experiments._figure2 import METHODS, write_figure2
from odeadv.experiments._launch import Job, launch
from odeadv.experiments._presets import PRESETS, configurations, with_eta
from odeadv.experiments._report import write_report
from odeadv.experiments._run import Measurement
from odeadv.experiments._tables import TABLES, Row, Table
from odeadv.support.files import check_folder, write_json
from odeadv.training import TrainingDiverged, make_fabric


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that all tables have."""
    presets = "; ".join(f"{preset.name}: {preset.says}" for preset in PRESETS.values())
    parser.add_argument("--preset", choices=PRESETS, default="smoke", help=presets)
    parser.add_argument("--dataset", choices=data.names(), help="instead of the preset's")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with (or for) the data sets")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the preset's")
    parser.add_argument("--methods", nargs="+", metavar="ROW", help="some of the rows, by name")
    parser.add_argument("--eta", type=float, help="instead of the preset's, as chosen by odeadv tune")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument(
        "--out", type=Path, help="folder for the page, the plot and the records (default: RUNS/TABLE-DATASET-PRESET)"
    )
    parser.add_argument(
        "--render", action="store_true", help="only make the page again, from all records of the table in --out"
    )
    parser.add_argument(
        "--autoattack", type=int, metavar="N",
        help="AutoAttack too, on the first N test images (of the last weights; needs the package pyautoattack)",
    )  # fmt: skip
    parser.add_argument(
        "--last", action="store_true", help="evaluate the last weights only, not those of the best epoch"
    )
    parser.add_argument("--launcher", choices=("local", "ray"), default="local", help="one run after the other, or Ray")
    parser.add_argument("--cpus", type=int, default=1, help="that Ray reserves for a run")
    parser.add_argument("--gpus", type=float, default=0.0, help="that Ray reserves for a run")
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    parser.add_argument(
        "--rehearse", type=int, metavar="STEPS",
        help="take the first steps of a training of each row, say how long the trainings of all seeds would take "
        "(without evaluations; on CUDA also the memory), write nothing and stop",
    )  # fmt: skip


def make_table(table: Table, args: argparse.Namespace) -> int:
    """Run what is missing of ``table``, copy the records, write the page and the plot; returns an exit status.

    Raises:
        ValueError, OSError, ImportError: before any run starts, if something is missing or does not fit.
    """
    preset = PRESETS[args.preset]
    dataset = args.dataset or preset.dataset
    if args.eta is not None:
        preset = with_eta(preset, table, dataset, args.eta)
    out = args.out or args.runs / f"{table.name}-{dataset}-{preset.name}"
    failed = 0
    if args.render or not (args.list or args.rehearse is not None):  # which write nothing
        check_folder("out", out)
    if not args.render:
        seeds = (args.seeds or preset.seeds)[: None if args.rehearse is None else 1]
        pairs = configurations(table, preset, dataset=dataset, methods=args.methods, seeds=seeds)
        if args.list:
            return _list(pairs)
        if args.rehearse is not None:
            return _rehearsed(table, [config for _, config in pairs], args, len(args.seeds or preset.seeds))
        failed = _run(table, [config for _, config in pairs], args, out)
        if int(os.environ.get("RANK", "0")):  # under torchrun the first process writes the page
            return 1 if failed else 0
    print(write_report(table, preset, dataset, out, out))
    return 1 if failed else 0


def _list(pairs: Sequence[tuple[Row, RunConfig]]) -> int:
    for row, config in pairs:
        print(f"{config.name}  {row.label}, seed {config.training.seed}")
    total = sum(training_passes(config) for _, config in pairs)
    if total:
        print(f"{len(pairs)} runs, {total:.3g} image passes to train them", file=sys.stderr)
    return 0


def _run(table: Table, configs: Sequence[RunConfig], args: argparse.Namespace, out: Path) -> int:
    """Run what is missing of ``configs`` and copy the records to ``out``; how many have failed."""
    check_folder("runs", args.runs)
    protocols: tuple[str | Measurement, ...] = (Measurement(table.protocol, best=not args.last),)
    if args.autoattack is not None:
        protocols = (*protocols, Measurement(table.autoattack, args.autoattack, best=False))
        require_packages(table.autoattack)
    jobs = [Job(config, protocols) for config in configs]
    records, failures = launch(jobs, args.runs, args.data, launcher=args.launcher, cpus=args.cpus, gpus=args.gpus)
    if not int(os.environ.get("RANK", "0")):
        for record, job in zip(records, [j for j in jobs if j not in [f.job for f in failures]], strict=True):
            write_json(out / f"{job.config.name}.json", record)
        for failure in failures:
            print(f"{failure.job.config.name}: {failure.reason}")
    return len(failures)


def _rehearsed(table: Table, configs: Sequence[RunConfig], args: argparse.Namespace, seeds: int) -> int:
    """Rehearse ``configs``, a line each, and say what so many seeds of them take; 1 if one of them fails."""
    if args.rehearse < 2:
        raise ValueError(f"rehearse: got {args.rehearse}, expected 2 steps or more, as the first one is not timed")
    images = data.load(configs[0].data.name, args.data)
    hours, failed = 0.0, 0
    for config in configs:
        fabric = make_fabric(precision=config.training.precision)
        fabric.launch()
        try:
            found = rehearse(config, images, args.rehearse, fabric=fabric)
        except (ValueError, TrainingDiverged, RuntimeError) as error:  # also what a device says when it is full
            failed += 1
            print(f"{config.method}: failed: {error}", flush=True)
            continue
        hours += found.hours
        if fabric.is_global_zero:
            print(f"{config.method}: {found}", flush=True)
    if not int(os.environ.get("RANK", "0")):
        rows = f"{len(configs) - failed} of {len(configs)} rows"
        every = f"; {seeds * hours:.3g} h for {seeds} seeds" if seeds > 1 else ""
        print(f"{table.name}: {hours:.3g} h to train {rows}, a seed of each{every}")
    return 1 if failed else 0


def make_figure2(args: argparse.Namespace) -> int:
    """Run what is missing of PGD training, then draw the Eq. 16 ratio from its records; returns an exit status."""
    preset = PRESETS[args.preset]
    dataset = args.dataset or preset.dataset
    if args.eta is not None:
        preset = with_eta(preset, TABLES["table2"], dataset, args.eta)
    args.out = args.out or args.runs / f"figure2-{dataset}-{preset.name}"
    status = 0
    if not args.render:
        args.methods = args.methods or list(METHODS)
        status = make_table(TABLES["table2"], args)
        if args.list or args.rehearse is not None or int(os.environ.get("RANK", "0")):
            return status
    print(write_figure2(preset, dataset, args.out, args.out))
    return status


def main(name: str, description: str | None, arguments: Sequence[str] | None = None) -> int:
    """The program of one table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_table_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        return make_figure2(args) if name == "figure2" else make_table(TABLES[name], args)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
