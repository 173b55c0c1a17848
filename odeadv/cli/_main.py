"""The command ``odeadv``: train, tune, evaluate, compare, list, tabulate, report, rerun, audit and diagnose.

Stands on everything else and holds no logic of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odeadv._version import __version__
from odeadv.support.files import check_file, check_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from odeadv.data import ImageDataset
    from odeadv.evaluation import Evaluation, Protocol
    from odeadv.experiments import RunConfig

_KEYS = """
A run's configuration has the keys data, model and training; what is left out has its default. In YAML:

    data: {name: cifar10, train_images: 5000, validation_images: 1000}
    model: {depth: 20, width: 16, damping: lambda-damp}
    training:
      objective: {name: pgd, eps: 8/255, alpha: 2/255, steps: 10}
      defence: {name: layerwise, scheme: strang, eta: 50}
      epochs: 30
      milestones: [15, 22]
      precision: bf16

Objectives: natural, pgd, trades, or "package.module:Class". Defences: none, layerwise (scheme: lie is LAD, strang is
LAD-SM, strang-midpoint the exact midpoint), or "package.module:Class". `odeadv train --method pgd+lad --print-config`
prints a whole one. An unknown key is an error.
"""

_ATTACKS = """
A protocol of your own is a .yaml or .json file; attacks are functions of odeadv.attacks, or autoattack:

    name: mine
    attacks:
      - {name: ifgsm, eps: 8/255, alpha: 2/255, steps: 100}
      - {name: pgd, eps: 8/255, alpha: 2/255, steps: 20, options: {restarts: 5, loss: margin}}
      - {name: apgd, eps: 8/255, steps: 100, score: worst}
"""

_Add = Callable[[argparse.ArgumentParser], None]
_Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 if a run failed, 2 for arguments that do not fit."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that a configuration can name an objective in a module here
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print(f"odeadv {args.command}: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"odeadv {args.command}: error: {_in_options(str(error))}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # diverged, or locked by another process
        print(f"odeadv {args.command}: {error}", file=sys.stderr)
        return 1
    return status


def _in_options(message: str) -> str:
    """``message`` of a function, with the name that its argument has on the command line."""
    argument, colon, rest = message.partition(":")
    return {"root": "data", "test": "images"}.get(argument, argument) + colon + rest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="odeadv",
        description="Layer-wise adversarial defence as an ODE: training, evaluation, tables, diagnostics.",
    )
    parser.add_argument("--version", action="version", version=f"odeadv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (help, epilog, add, run) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        add(sub)
        sub.set_defaults(run=run)
    return parser


def _add_data(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--data", type=Path, metavar="DIR", help="folder with (or for) the data sets")


def _add_config(sub: argparse.ArgumentParser) -> None:
    from odeadv import data
    from odeadv.experiments import PRESETS

    sub.add_argument("config", nargs="?", type=Path, help="a .yaml or .json file (see below)")
    sub.add_argument("--method", help="instead of a file: such as natural, pgd+lad, trades+lad-sm, pgd+lad+noise")
    sub.add_argument("--preset", choices=PRESETS, help="size of a --method (default: smoke)")
    sub.add_argument("--dataset", choices=data.names(), help="of a --method, instead of the preset's")
    sub.add_argument("--seed", type=int, help="instead of the file's, or of a --method (default: 0)")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as training.lr=0.05")
    _add_data(sub)


def _config(args: argparse.Namespace) -> RunConfig:
    from odeadv import experiments
    from odeadv.support import plain as configuration

    if (args.config is None) == (args.method is None):
        raise ValueError("config: give either a configuration file or --method")
    if args.config is not None:
        if args.preset is not None or args.dataset is not None:
            raise ValueError("preset, dataset: belong to --method; a file says its own, which --set changes")
        if not args.config.is_file():
            what = "is a folder, expected a file such as its config.json" if args.config.is_dir() else "is not there"
            raise FileNotFoundError(f"config: {args.config} {what}")
        config = experiments.load_config(args.config)
        if args.seed is not None:
            config = replace(config, training=replace(config.training, seed=args.seed))
    else:
        preset = experiments.PRESETS[args.preset or "smoke"]
        objective = experiments.parse_method(args.method).objective
        row, dataset = experiments.Row(args.method), args.dataset or preset.dataset
        config = experiments.configuration(row, preset.sizes[objective], dataset, args.seed or 0)
    return experiments.RunConfig.from_dict(configuration.override(config.to_dict(), args.set))


def _add_train(sub: argparse.ArgumentParser) -> None:
    _add_config(sub)
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    sub.add_argument("--protocol", nargs="*", default=[], help="evaluate by these afterwards: table1, table2, ...")
    sub.add_argument("--accelerator", default="auto", help="of lightning-fabric: auto, cpu, cuda, mps")
    sub.add_argument("--devices", type=int, default=1, help="processes on this machine (torchrun's count, under it)")
    sub.add_argument("--nodes", type=int, default=1, help="machines")
    sub.add_argument("--tensorboard", action="store_true", help="write event files to the run's folder too")
    sub.add_argument("--print-config", action="store_true", help="print the configuration as YAML and stop")


def _train(args: argparse.Namespace) -> int:
    from odeadv import data, experiments
    from odeadv.training import make_fabric

    config = _config(args)
    if args.print_config:
        import yaml

        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
        return 0
    check_folder("runs", args.runs)
    images = data.load(config.data.name, args.data)
    fabric = make_fabric(
        precision=config.training.precision, accelerator=args.accelerator, devices=args.devices, nodes=args.nodes
    )
    fabric.launch()
    record = experiments.run(
        config, images, args.runs, protocols=args.protocol, label=config.method, tensorboard=args.tensorboard,
        fabric=fabric,
    )  # fmt: skip
    if fabric.is_global_zero:
        print(args.runs / config.name)
        for protocol in args.protocol:
            print(_summary(protocol, record["evaluations"]["last"][protocol]))
    return 0


def _add_tune(sub: argparse.ArgumentParser) -> None:
    _add_config(sub)
    sub.add_argument("--etas", type=float, nargs="+", required=True, help="values to try")
    sub.add_argument("--folds", type=int, default=5, help="parts of the training set (default: 5)")
    sub.add_argument("--only-folds", type=int, help="use only so many of them, to save time")
    sub.add_argument("--protocol", default="table2", help="whose mean robust accuracy decides (default: table2)")
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    sub.add_argument("--out", type=Path, help="JSON file for the result")


def _tune(args: argparse.Namespace) -> int:
    from odeadv import data, experiments

    config = _config(args)
    check_file("out", args.out)
    check_folder("runs", args.runs)
    images = data.load(config.data.name, args.data)
    found = experiments.tune(
        config, images, args.etas, runs=args.runs, folds=args.folds, only=args.only_folds, protocol=args.protocol
    )
    for candidate in found["candidates"]:
        scores = ", ".join(f"{100 * score:.2f}" for score in candidate["scores"])
        print(f"eta {candidate['eta']:g}: {100 * candidate['mean']:.2f} ({scores})")
    print(f"chosen: eta {found['chosen']:g}")
    if args.out:
        write_json(args.out, found)
    return 0


def _add_evaluate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", type=Path, help="a run's folder, or its last.safetensors or best.safetensors")
    sub.add_argument(
        "--protocol",
        default="table2",
        help="table1, table2, table6, autoattack, or a file (see below; default: table2)",
    )
    sub.add_argument("--images", type=int, help="so many test images only, balanced over the classes")
    sub.add_argument("--batch-size", type=int, default=128, help="images in one forward pass (default: 128)")
    sub.add_argument("--fold", action="store_true", help="fold batch norms, on a copy: faster, the same but for ties")
    sub.add_argument("--compile", action="store_true", help="torch.compile a copy: pays for long evaluations only")
    sub.add_argument(
        "--out", type=Path, metavar="FILE",
        help="JSON file (default: standard output); FILE.journal keeps what is done for the same command to go on",
    )  # fmt: skip
    _add_data(sub)


def _evaluate(args: argparse.Namespace) -> int:
    from odeadv import evaluate
    from odeadv.evaluation import ProgressLine

    check_file("out", args.out)
    protocol = _protocol(args.protocol)
    net, info = _load(args.checkpoint)
    images = _test_images(info, args)
    journal = None if args.out is None else args.out.with_name(f"{args.out.name}.journal")
    result = evaluate(
        net,
        (images.test_images, images.test_labels),
        protocol,
        batch_size=args.batch_size,
        progress=ProgressLine(),
        resume=journal,
        fold=args.fold,
        compile=args.compile,
    )
    if journal is None:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        write_json(args.out, result.to_dict())
        journal.unlink(missing_ok=True)
        print(result)
    return 0


def _protocol(given: str) -> str | Protocol:
    """A protocol's name as it is, or the protocol of a file."""
    from odeadv.evaluation import Protocol
    from odeadv.support import plain as configuration

    return configuration.load(Protocol, Path(given)) if Path(given).suffix else given


def _add_compare(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("a", type=Path, help="JSON of odeadv evaluate, a run's folder, or its record")
    sub.add_argument("b", type=Path, help="another one, of the same images and attacks")
    sub.add_argument("--protocol", default="table2", help="which evaluation of a run (default: table2)")
    sub.add_argument("--weights", choices=("last", "best"), default="last", help="of a run (default: last)")
    sub.add_argument("--json", action="store_true", help="as JSON")


def _compare(args: argparse.Namespace) -> int:
    from odeadv.evaluation import compare

    tests = compare(*(_evaluation(path, args.protocol, args.weights) for path in (args.a, args.b)))
    if args.json:
        print(json.dumps({name: test.to_dict() for name, test in tests.items()}, indent=1))
        return 0
    print(f"{next(iter(tests.values())).n} images; accuracies in %, p by McNemar's exact test, two-sided")
    print(f"{'':34}{'a':>7}{'b':>7}{'a - b':>7}{'only a':>8}{'only b':>8}{'p':>9}")
    for name, test in tests.items():
        a, b = (100 * (test.both + only) / test.n for only in (test.only_a, test.only_b))
        print(
            f"{name:34}{a:7.2f}{b:7.2f}{100 * test.difference:+7.2f}{test.only_a:8}{test.only_b:8}{test.p_value:9.2g}"
        )
    return 0


def _evaluation(path: Path, protocol: str, weights: str) -> Evaluation:
    """What `odeadv evaluate` wrote, or an evaluation of a run's record."""
    from odeadv.evaluation import Evaluation
    from odeadv.experiments import load_record

    file = path / "record.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON: {error}") from None
    if isinstance(found, dict) and "evaluations" in found:
        evaluations = load_record(file)["evaluations"].get(weights, {})
        if protocol not in evaluations:
            names = ", ".join(evaluations) or "none"
            raise ValueError(f"protocol: {file} has no {protocol!r} of its {weights} weights, but {names}")
        found = evaluations[protocol]
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected an evaluation or a run's record")
    try:
        return Evaluation.from_dict(found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def _add_runs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", nargs="?", type=Path, default=Path("runs"))
    sub.add_argument("--json", action="store_true", help="as JSON")


def _runs(args: argparse.Namespace) -> int:
    from odeadv import experiments

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
            f"{protocol}: clean {_percent(values['clean'])}, average {_percent(values['average'])}"
            for protocol, values in entry["evaluations"].items()
        )
        print(f"{entry['name']}  {entry['state']}, epoch {entry['epoch']}/{entry['epochs']}  {evaluations}".rstrip())
    return 0


def _add_table(sub: argparse.ArgumentParser) -> None:
    from odeadv.experiments import TABLES, add_table_arguments

    sub.add_argument("table", choices=TABLES)
    add_table_arguments(sub)


def _table(args: argparse.Namespace) -> int:
    from odeadv.experiments import TABLES, make_table

    return make_table(TABLES[args.table], args)


def _add_report(sub: argparse.ArgumentParser) -> None:
    from odeadv import data
    from odeadv.experiments import PRESETS, TABLES

    sub.add_argument("table", choices=[*TABLES, "claims"], help='a table, or "claims" for the page of all claims')
    sub.add_argument("records", type=Path, help="folder of records")
    sub.add_argument("--preset", choices=PRESETS, default="cpu")
    sub.add_argument("--dataset", choices=data.names(), help="instead of the preset's")
    sub.add_argument("--eta", type=float, help="instead of the preset's, as chosen by odeadv tune")
    sub.add_argument("--out", type=Path, required=True, help="folder for the page and the plot")


def _report(args: argparse.Namespace) -> int:
    from odeadv.experiments import PRESETS, TABLES, with_eta, write_claims, write_report

    check_folder("out", args.out)
    if args.table == "claims":
        print(write_claims(args.records, args.out))
        return 0
    table, preset = TABLES[args.table], PRESETS[args.preset]
    if args.eta is not None:
        preset = with_eta(preset, table, args.dataset or preset.dataset, args.eta)
    print(write_report(table, preset, args.dataset, args.records, args.out))
    return 0


def _add_rerun(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("record", type=Path, help="a JSON record, or the folder of a run")
    sub.add_argument("--runs", type=Path, default=Path("reruns"), help="folder for the new run (default: reruns)")
    sub.add_argument("--autoattack", action="store_true", help="AutoAttack again too")
    _add_data(sub)


def _rerun(args: argparse.Namespace) -> int:
    from odeadv import data, experiments

    file = args.record / "record.json" if args.record.is_dir() else args.record
    if file.resolve().parent.parent == args.runs.resolve():
        raise ValueError(f"runs: {args.runs} is the folder that the record is in, expected another")
    check_folder("runs", args.runs)
    record = experiments.load_record(file)
    images = data.load(record["config"]["data"]["name"], args.data)
    found = experiments.rerun(record, images, args.runs, autoattack=args.autoattack, label=record["method"])
    print(found)
    return 0 if found.same else 1


def _add_budget(sub: argparse.ArgumentParser) -> None:
    from odeadv.experiments import PRESETS

    sub.add_argument("--preset", choices=PRESETS, default="paper")
    sub.add_argument(
        "--rates", type=float, nargs="+", default=[2500.0, 10000.0], metavar="N",
        help="images a second in natural training that hours are given for (default: 2500 10000)",
    )  # fmt: skip
    sub.add_argument("--out", type=Path, help="folder for budget.json and budget.md (default: print the page)")


def _budget(args: argparse.Namespace) -> int:
    from odeadv.experiments import PRESETS, write_budget
    from odeadv.experiments import _cost as _budget

    check_folder("out", args.out)
    preset = PRESETS[args.preset]
    print(write_budget(preset, args.rates, args.out) if args.out else _budget.page(_budget.plain(preset, args.rates)))
    return 0


def _add_audit(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", type=Path, help="a run's folder, or its weights")
    sub.add_argument("--images", type=int, default=500, help="test images, balanced over the classes (default: 500)")
    sub.add_argument("--eps", type=float, default=8.0, help="radius in 1/255 (default: 8)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--surrogate", type=Path, help="another run, whose adversarial images are tried on this one")
    sub.add_argument("--out", type=Path, help="folder for the page (default: audit in the run's folder)")
    _add_data(sub)


def _audit(args: argparse.Namespace) -> int:
    import torch

    from odeadv import experiments
    from odeadv.audit import audit

    out = args.out or _beside(args.checkpoint) / "audit"
    check_folder("out", out)
    net, info = _load(args.checkpoint)
    images = _test_images(info, args)
    generator = torch.Generator().manual_seed(args.seed)
    surrogate = None if args.surrogate is None else _load(args.surrogate)[0]
    result = audit(
        net, (images.test_images, images.test_labels), eps=args.eps / 255, generator=generator, surrogate=surrogate
    )
    name = experiments.RunConfig.from_dict(info["run"]).name
    result.write(
        out, f"{name}, weights of epoch {info['epoch']}, the first test images of each class, seed {args.seed}."
    )
    print(result)
    print(out)
    return 0 if result.passed else 1


def _add_diagnose(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", type=Path, help="a run's folder, or its weights")
    sub.add_argument("--beside", type=Path, help="another one, on the same images and page, such as one without LAD")
    sub.add_argument(
        "--attack", type=float, metavar="EPS",
        help="follow the difference that FGSM of this radius in 1/255 makes, not a random one",
    )  # fmt: skip
    sub.add_argument("--images", type=int, default=128, help="test images, balanced over the classes (default: 128)")
    sub.add_argument("--eta", type=float, help="instead of the run's own")
    sub.add_argument("--out", type=Path, help="folder for the page (default: diagnostics in the run's folder)")
    _add_data(sub)


def _diagnose(args: argparse.Namespace) -> int:
    from odeadv import experiments
    from odeadv.data import to_float
    from odeadv.diagnostics import diagnose
    from odeadv.models import Averaged

    if args.attack is not None and not 0 < args.attack <= 255:
        raise ValueError(f"attack: got {args.attack:g}, expected a radius in 1/255, above 0 and at most 255")
    out = args.out or _beside(args.checkpoint) / "diagnostics"
    check_folder("out", out)
    loaded = [_load(checkpoint) for checkpoint in (args.checkpoint, args.beside) if checkpoint is not None]
    configs = [experiments.RunConfig.from_dict(info["run"]) for _, info in loaded]
    # The noise is averaged at inference; the dynamics are those of one network.
    nets: list[Any] = [net.net if isinstance(net, Averaged) else net for net, _ in loaded]
    substeps = [net.solve_options.get("substep") for net in nets]
    if len({config.name for config in configs}) < len(configs) or any(
        config.data.name != configs[0].data.name or substep != substeps[0]
        for config, substep in zip(configs, substeps, strict=True)
    ):
        raise ValueError("beside: expected another run, on the same data, of a network solved by the same sub-steps")
    etas = [getattr(config.training.defence, "eta", 0.0) if args.eta is None else args.eta for config in configs]
    if args.eta is None and not all(etas):
        etas = [max(etas)] * len(etas)  # side by side, both are driven by the eta that one of them was trained with
        if not any(etas):
            print("odeadv diagnose: trained without a defence, so eta is 0; --eta measures another", file=sys.stderr)
    test = _test_images(loaded[0][1], args)
    device = next(nets[0].parameters()).device
    images, labels = to_float(test.test_images).to(device), test.test_labels.to(device)
    names = [config.name for config in configs] if args.beside else [""]
    fields = {name: net.field(images, labels, eta) for name, net, eta in zip(names, nets, etas, strict=True)}
    starts = None
    if args.attack is not None:
        starts = {name: _attacked(net, images, labels, args.attack) for name, net in zip(names, nets, strict=True)}
    runs = " and ".join(f"{config.name}, eta {eta:g}" for config, eta in zip(configs, etas, strict=True))
    diagnose(fields, out, substep=substeps[0], start=starts, title=f"{runs}, {len(labels)} test images")
    print(out)
    return 0


def _attacked(net: Any, images: Tensor, labels: Tensor, eps_255: float) -> Tensor:
    """The initial state of the images that FGSM makes of ``images``."""
    import torch

    from odeadv import attacks

    with torch.no_grad():
        state: Tensor = net.stem(attacks.fgsm(net, images, labels, eps=eps_255 / 255))
    return state


def _beside(checkpoint: Path) -> Path:
    """The folder of the run."""
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def _load(checkpoint: Path) -> tuple[nn.Module, dict[str, Any]]:
    import torch

    from odeadv import experiments

    net, info = experiments.load_model(checkpoint)
    return net.to("cuda" if torch.cuda.is_available() else "cpu"), info


def _test_images(info: dict[str, Any], args: argparse.Namespace) -> ImageDataset:
    """The data of the run itself (its fold or subset), with so many test images."""
    from odeadv import data
    from odeadv.experiments import DataConfig
    from odeadv.support import plain as configuration

    config = configuration.from_dict(DataConfig, info["run"]["data"])
    subset, _ = config.take(data.load(config.name, args.data))
    subset = subset.subset(None, args.images)
    print(f"{len(subset.test_labels)} test images of {config.name}", file=sys.stderr)
    return subset


def _percent(share: float | None) -> str:
    """In %; attacks that are scored worst so far only have no last-iterate accuracy."""
    return "-" if share is None else f"{100 * share:.2f}"


def _summary(protocol: str, result: dict[str, object]) -> str:
    attacks = result["attacks"]
    assert isinstance(attacks, list)
    parts = [f"{a['name']}{a['steps'] or ''} {a['eps_255']:g}/255: {_percent(a['robust_accuracy'])}" for a in attacks]
    return f"{protocol}: clean {100 * float(str(result['clean_accuracy'])):.2f}, " + ", ".join(parts)


# By name: help, epilog, what adds its arguments, what runs it.
COMMANDS: dict[str, tuple[str, str | None, _Add, _Run]] = {
    "train": ("train one network; goes on where it was stopped", _KEYS, _add_train, _train),
    "tune": ("choose eta by cross-validation on the training set (Appendix B.1)", _KEYS, _add_tune, _tune),
    "evaluate": (
        "evaluate trained weights: clean and robust accuracy, as JSON", _ATTACKS, _add_evaluate, _evaluate,
    ),
    "compare": ("compare two evaluations image by image (McNemar)", None, _add_compare, _compare),
    "runs": ("list the runs in a folder: what they are, how far they are, how accurate", None, _add_runs, _runs),
    "table": ("run what is missing of a table and report it", None, _add_table, _table),
    "report": ("make a table's page and plot again, from the JSON of its runs alone", None, _add_report, _report),
    "rerun": (
        "train and evaluate again what a record is of, and compare; exit status 1 if it differs",
        None, _add_rerun, _rerun,
    ),
    "budget": (
        "count what all tables ask for at a preset, in image passes and hours; runs nothing",
        None, _add_budget, _budget,
    ),
    "audit": (
        "go through the checklist for trustworthy attacks; writes a page; exit status 1 if a line fails",
        None, _add_audit, _audit,
    ),
    "diagnose": (
        "measure the dynamics of trained weights (Eq. 16, Theorems 3.2 and 3.3); writes a page",
        None, _add_diagnose, _diagnose,
    ),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
