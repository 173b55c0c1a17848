"""The commands that train: train, tune, rerun; and the list of runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from odeadv.support.extras import extra
from odeadv.support.files import check_file, check_folder, write_json

from ._shared import add_config, add_data, config_of, percent


def add_train(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `odeadv train`."""
    add_config(sub)
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    sub.add_argument(
        "--protocol", nargs="*", default=[], help="protocols of evaluations after the training: table1, table2, ..."
    )
    sub.add_argument("--accelerator", default="auto", help="accelerator of lightning-fabric: auto, cpu, cuda, mps")
    sub.add_argument(
        "--devices", type=int, default=1, help="number of processes on this machine (torchrun overrides it)"
    )
    sub.add_argument("--nodes", type=int, default=1, help="number of machines (torchrun overrides it)")
    sub.add_argument("--init", type=Path, metavar="FILE", help="start from these weights: a run's folder or checkpoint")
    sub.add_argument(
        "--extend", type=Path, metavar="RUN",
        help="continue this finished run, which has the same configuration but fewer epochs",
    )  # fmt: skip
    sub.add_argument(
        "--checkpoint-every", type=float, default=120.0, metavar="SECONDS",
        help="time between checkpoints within an epoch (default: 120)",
    )  # fmt: skip
    sub.add_argument("--tensorboard", action="store_true", help="also write event files to the run's folder")
    sub.add_argument("--print-config", action="store_true", help="print the configuration as YAML and stop")


def train(args: argparse.Namespace) -> int:
    """Train one run, evaluate it and print its folder."""
    from odeadv import data, experiments
    from odeadv.training import make_fabric

    config = config_of(args)
    if args.print_config:
        with extra("train"):
            import yaml
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
        return 0
    check_folder("runs", args.runs)
    dataset = data.load(config.data.name, args.data)
    fabric = make_fabric(
        precision=config.training.precision, accelerator=args.accelerator, devices=args.devices, nodes=args.nodes
    )
    fabric.launch()
    record = experiments.run(
        config, dataset, args.runs, protocols=args.protocol, label=config.method, tensorboard=args.tensorboard,
        init=args.init, extend=args.extend, checkpoint_every=args.checkpoint_every, keep_checkpoint=True, fabric=fabric,
    )  # fmt: skip
    if fabric.is_global_zero:
        print(args.runs / experiments.RunConfig.from_dict(record["config"]).name)
        for protocol in args.protocol:
            print(_summary(protocol, record["evaluations"]["last"][protocol]))
    return 0


def add_tune(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `odeadv tune`."""
    add_config(sub)
    sub.add_argument("--etas", type=float, nargs="+", required=True, help="values to try")
    sub.add_argument("--folds", type=int, default=5, help="number of parts of the training set (default: 5)")
    sub.add_argument("--only-folds", type=int, help="hold out only this number of folds in turn, to save time")
    sub.add_argument(
        "--protocol", default="table2", help="protocol whose mean robust accuracy decides (default: table2)"
    )
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    sub.add_argument("--out", type=Path, help="JSON file for the result")


def tune(args: argparse.Namespace) -> int:
    """Choose eta by cross-validation and print the scores."""
    from odeadv import data, experiments

    config = config_of(args)
    check_file("out", args.out)
    check_folder("runs", args.runs)
    dataset = data.load(config.data.name, args.data)
    found = experiments.tune(
        config, dataset, args.etas, runs=args.runs, folds=args.folds, only=args.only_folds, protocol=args.protocol
    )
    for candidate in found["candidates"]:
        scores = ", ".join(f"{100 * score:.2f}" for score in candidate["scores"])
        print(f"eta {candidate['eta']:g}: {100 * candidate['mean']:.2f} ({scores})")
    print(f"chosen: eta {found['chosen']:g}")
    if args.out:
        write_json(args.out, found)
    return 0


def add_runs(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `odeadv runs`."""
    sub.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    sub.add_argument(
        "--plot", action="store_true", help="draw the training of one run; FOLDER is then the folder of this run"
    )
    sub.add_argument("--json", action="store_true", help="as JSON")


def runs(args: argparse.Namespace) -> int:
    """List the runs of a folder, or draw one run."""
    from odeadv import experiments

    if args.plot:
        print(experiments.plot_run(args.folder))
        return 0
    found = experiments.list_runs(args.folder)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    if not found:
        print(f"no runs in {args.folder}")
    for entry in found:
        if entry["state"] == "unreadable":
            print(f"{entry['name']}  unreadable: {entry['error']}")
            continue
        evaluations = "  ".join(
            f"{protocol}: clean {percent(values['clean'])}, average {percent(values['average'])}"
            for protocol, values in entry["evaluations"].items()
        )
        print(f"{entry['name']}  {entry['state']}, epoch {entry['epoch']}/{entry['epochs']}  {evaluations}".rstrip())
    return 0


def add_rerun(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `odeadv rerun`."""
    sub.add_argument("record", type=Path, help="a JSON record, or the folder of a run")
    sub.add_argument("--runs", type=Path, default=Path("reruns"), help="folder for the new run (default: reruns)")
    sub.add_argument("--autoattack", action="store_true", help="AutoAttack again too")
    sub.add_argument("--init", type=Path, metavar="FILE", help="the weights that the run started from, if it had any")
    add_data(sub)


def rerun(args: argparse.Namespace) -> int:
    """Repeat a run from its record and compare the two; return status 1 if they differ."""
    from odeadv import data, experiments

    file = args.record / "record.json" if args.record.is_dir() else args.record
    if file.resolve().parent.parent == args.runs.resolve():
        raise ValueError(f"runs: {args.runs} is the folder that the record is in, expected another")
    check_folder("runs", args.runs)
    record = experiments.load_record(file)
    dataset = data.load(record["config"]["data"]["name"], args.data)
    found = experiments.rerun(
        record, dataset, args.runs, autoattack=args.autoattack, label=record["method"], init=args.init
    )
    print(found)
    return 0 if found.same else 1


def _summary(protocol: str, result: dict[str, object]) -> str:
    attacks = result["attacks"]
    assert isinstance(attacks, list)
    parts = []
    for attack in attacks:
        radius = attack.get("radius") or f"{attack['eps_255']:g}/255"  # version 2 of the schema lacks the radius
        parts.append(f"{attack['name']}{attack['steps'] or ''} {radius}: {percent(attack['robust_accuracy'])}")
    return f"{protocol}: clean {100 * float(str(result['clean_accuracy'])):.2f}, " + ", ".join(parts)
