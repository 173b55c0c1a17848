"""The commands of tables: table, report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from odeadv.support.files import check_folder

from ._shared import add_data, listed

if TYPE_CHECKING:
    from odeadv.experiments import Failure, Preset, Table


def add_table(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `odeadv table`."""
    from odeadv import data
    from odeadv.experiments import PRESETS, TABLES

    titles = {name: table.title for name, table in TABLES.items()} | {"figure2": "Figure 2: the Eq. 16 ratio"}
    sub.epilog = listed("Tables", titles) + listed("Presets", {name: one.says for name, one in PRESETS.items()})
    sub.add_argument(
        "table", nargs="?", choices=titles, metavar="TABLE",
        help="name of a table, see below; --list without a name shows the cost of all tables",
    )  # fmt: skip
    sub.add_argument(
        "--preset",
        choices=PRESETS,
        default="smoke",
        metavar="PRESET",
        help="size of the runs, see below (default: smoke)",
    )
    sub.add_argument("--dataset", choices=data.names(), help="data set (default: the preset's)")
    add_data(sub)
    sub.add_argument("--seeds", type=int, nargs="+", help="seeds (default: the preset's)")
    sub.add_argument("--methods", nargs="+", metavar="ROW", help="names of some rows of the table")
    sub.add_argument("--eta", type=float, help="eta, such as one that odeadv tune chose (default: the preset's)")
    sub.add_argument(
        "--images", type=int, nargs="+", metavar="N",
        help="number of training images instead of the preset's; a second number sets the number of test images",
    )  # fmt: skip
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    sub.add_argument(
        "--out", type=Path, help="folder for the page, the plot and the records (default: RUNS/TABLE-DATASET-PRESET)"
    )
    sub.add_argument(
        "--render", action="store_true", help="only make the page again, from all records of the table in --out"
    )
    sub.add_argument(
        "--autoattack", type=int, metavar="N",
        help="also run AutoAttack on the first N test images, for the last weights (needs the package pyautoattack)",
    )  # fmt: skip
    sub.add_argument(
        "--last", action="store_true", help="evaluate only the last weights, not the weights of the best epoch"
    )
    sub.add_argument("--launcher", choices=("local", "ray"), default="local", help="one run after the other, or Ray")
    sub.add_argument("--cpus", type=int, default=1, help="number of CPUs that Ray reserves for a run")
    sub.add_argument("--gpus", type=float, default=0.0, help="number of GPUs that Ray reserves for a run")
    sub.add_argument("--list", action="store_true", help="print the runs, or the cost of all tables, and stop")
    sub.add_argument(
        "--rates", type=float, nargs="+", default=[2500.0, 10000.0], metavar="N",
        help="rates for the hours of --list, in images per second of natural training (default: 2500 10000)",
    )  # fmt: skip
    sub.add_argument(
        "--rehearse", type=int, metavar="STEPS",
        help="take the first steps of a training of each row, print the estimated time of the trainings of all seeds "
        "(without evaluations; on CUDA also the memory), and stop without writing files",
    )  # fmt: skip


def table(args: argparse.Namespace) -> int:
    """Make the missing runs of a table and report it, or list or rehearse its runs."""
    from odeadv.experiments import METHODS, PRESETS, make_table, with_eta, with_images, write_figure2, write_report

    preset = PRESETS[args.preset]
    if args.table is None:
        if not args.list:
            raise ValueError("table: got none, expected the name of a table, or --list for the cost of all")
        return _list_all(preset, args.rates)
    figure = args.table == "figure2"
    dataset = args.dataset or preset.dataset
    chosen = preset.table("table2" if figure else args.table, dataset)
    methods = args.methods or (list(METHODS) if figure else None)
    if args.eta is not None:
        preset = with_eta(preset, chosen, dataset, args.eta)
    if args.images is not None:
        if len(args.images) > 2:
            raise ValueError(f"images: got {len(args.images)} numbers, expected one (training), or two (and test)")
        preset = with_images(preset, *args.images)
    if args.list:
        return _list(chosen, preset, dataset, methods, args.seeds, args.rates)
    if args.rehearse is not None:
        return _rehearse(chosen, preset, dataset, methods, args.seeds, args.data, args.rehearse)
    out = args.out or args.runs / f"{args.table}-{dataset}-{preset.name}"
    check_folder("out", out)
    failures: list[Failure] = []
    if not args.render:
        failures, first = make_table(
            chosen, preset, dataset=dataset, methods=methods, seeds=args.seeds, runs=args.runs, out=out,
            folder=args.data, best=not args.last, autoattack=args.autoattack, launcher=args.launcher, cpus=args.cpus,
            gpus=args.gpus,
        )  # fmt: skip
        for failure in failures if first else []:
            print(f"{failure.job.config.name}: {failure.reason}")
        if not first:  # only the first process writes the page
            return 1 if failures else 0
    if not figure or not args.render:
        write_report(chosen, preset, dataset, out, out)
        print(_told(chosen, preset, dataset, out, out))
    if figure:
        print(write_figure2(preset, dataset, out, out))
    return 1 if failures else 0


def _told(table: Table, preset: Preset, dataset: str, records: Path, out: Path) -> str:
    """Return the summary of a table and the paths of its page and picture."""
    from odeadv.experiments import summary

    page = out / table.name
    return f"\n{summary(table, preset, dataset, records)}\n\npage:    {page}.md\npicture: {page}.png"


def _list_all(preset: Preset, rates: list[float]) -> int:
    from odeadv.experiments import cost_page

    print(cost_page(preset, rates))
    return 0


def _list(
    table: Table, preset: Preset, dataset: str, methods: list[str] | None, seeds: list[int] | None, rates: list[float]
) -> int:
    from odeadv.experiments import configurations, hours, training_passes

    pairs = configurations(table, preset, dataset=dataset, methods=methods, seeds=seeds)
    for row, config in pairs:
        print(f"{config.name}  {row.label}, seed {config.training.seed}")
    total = sum(training_passes(config) for _, config in pairs)
    if total:
        spent = ", ".join(f"{hours(total, rate):.3g} h at {rate:g} images/s" for rate in rates)
        print(f"{len(pairs)} runs, {total:.3g} image passes to train them: {spent}", file=sys.stderr)
    return 0


def _rehearse(
    table: Table,
    preset: Preset,
    dataset: str,
    methods: list[str] | None,
    seeds: list[int] | None,
    folder: Path | None,
    steps: int,
) -> int:
    """Rehearse one seed per row and print the time for all seeds; return status 1 if a row fails."""
    from odeadv.experiments import configurations, rehearse_all
    from odeadv.experiments import first_process as is_first

    wanted = list(seeds or preset.seeds)
    pairs = configurations(table, preset, dataset=dataset, methods=methods, seeds=wanted[:1])
    total, failed, first = 0.0, 0, is_first()
    for config, found in rehearse_all([config for _, config in pairs], steps, folder):
        if isinstance(found, Exception):
            failed += 1
            print(f"{config.method}: failed: {found}", flush=True)
            continue
        total += found.hours
        if first:
            print(f"{config.method}: {found}", flush=True)
    if first:
        rows = f"{len(pairs) - failed} of {len(pairs)} rows"
        every = f"; {len(wanted) * total:.3g} h for {len(wanted)} seeds" if len(wanted) > 1 else ""
        print(f"{table.name}: {total:.3g} h to train {rows}, a seed of each{every}")
    return 1 if failed else 0


def add_report(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `odeadv report`."""
    from odeadv import data
    from odeadv.experiments import PRESETS, TABLES

    sub.add_argument(
        "table", choices=[*TABLES, "claims"], metavar="TABLE",
        help='a table of odeadv table --help, or "claims" for the page of all claims',
    )  # fmt: skip
    sub.add_argument("records", type=Path, help="folder of records")
    sub.add_argument("--preset", choices=PRESETS, default="cpu", help="size of the runs (default: cpu)")
    sub.add_argument("--dataset", choices=data.names(), help="data set (default: the preset's)")
    sub.add_argument("--eta", type=float, help="eta, such as one that odeadv tune chose (default: the preset's)")
    sub.add_argument("--out", type=Path, required=True, help="folder for the page and the plot")


def report(args: argparse.Namespace) -> int:
    """Make a page and its plot again from records."""
    from odeadv.experiments import PRESETS, with_eta, write_claims, write_report

    check_folder("out", args.out)
    if args.table == "claims":
        print(write_claims(args.records, args.out))
        return 0
    preset = PRESETS[args.preset]
    dataset = args.dataset or preset.dataset
    table = preset.table(args.table, dataset)
    if args.eta is not None:
        preset = with_eta(preset, table, dataset, args.eta)
    write_report(table, preset, dataset, args.records, args.out)
    print(_told(table, preset, dataset, args.records, args.out))
    return 0
