"""The commands that inspect trained weights: evaluate, compare, audit, diagnose."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ._shared import add_data, radius

ATTACKS = """
You can write your own protocol in a .yaml or .json file. Attacks are functions of odeadv.attacks, autoattack, or
your own, as "module:function":

    name: mine
    attacks:
      - {name: ifgsm, eps: 8/255, alpha: 2/255, steps: 100}
      - {name: pgd, eps: 8/255, alpha: 2/255, steps: 20, options: {restarts: 5, loss: margin}}
      - {name: apgd, eps: 8/255, steps: 100, score: worst}
"""


def _add_network(sub: argparse.ArgumentParser, verb: str) -> None:
    """Add the arguments for the network to inspect and its images."""
    from odeadv import data, models

    sub.add_argument(
        "network", metavar="NETWORK",
        help="the folder of a run, or its last.safetensors or best.safetensors; or a network of the package "
        f"({', '.join(models.pretrained_names())}); or module:name, your own network to {verb} on --dataset: an "
        "nn.Module, or a function that returns one, in a module of the current folder",
    )  # fmt: skip
    sub.add_argument("--weights", type=Path, metavar="FILE", help="state dict of your own network, .safetensors or .pt")
    sub.add_argument("--dataset", choices=data.names(), help="data set for your own network; a run has its own")
    sub.add_argument(
        "--output", metavar="KEY", help="place of the logits in your network's outputs: a key, attribute or index"
    )
    add_data(sub)


def _network(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments for the network to inspect and its images, as keywords."""
    output = int(args.output) if args.output is not None and args.output.lstrip("-").isdigit() else args.output
    return {
        "network": args.network, "weights": args.weights, "dataset": args.dataset, "folder": args.data,
        "images": args.images, "output": output, "batch_size": args.batch_size,
    }  # fmt: skip


def add_evaluate(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `odeadv evaluate`."""
    _add_network(sub, "evaluate")
    sub.add_argument(
        "--protocol",
        default="table2",
        help="table1, table2, table6, autoattack, or a file (see below; default: table2)",
    )
    sub.add_argument("--images", type=int, help="number of test images, balanced over the classes (default: all)")
    sub.add_argument("--batch-size", type=int, default=128, help="images in one forward pass (default: 128)")
    sub.add_argument("--fold", action="store_true", help="fold batch norms on a copy: faster; only ties may change")
    sub.add_argument("--compile", action="store_true", help="torch.compile a copy: faster only for long evaluations")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sub.add_argument(
        "--out", type=Path, metavar="FILE",
        help="JSON file for the result; FILE.journal keeps finished work, so that the same command can resume",
    )  # fmt: skip


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate trained weights, print the result, and write it if a file is given."""
    from odeadv.evaluation import ProgressLine, Protocol
    from odeadv.experiments import evaluate_run
    from odeadv.support import plain

    # A name with a suffix is the path of a protocol file.
    protocol = plain.read(Protocol, Path(args.protocol)) if Path(args.protocol).suffix else args.protocol
    result = evaluate_run(
        protocol=protocol, out=args.out, progress=ProgressLine(), fold=args.fold, compile=args.compile, **_network(args)
    )
    print(json.dumps(result.to_dict(), indent=1) if args.json else result)
    return 0


def add_compare(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `odeadv compare`."""
    sub.add_argument("a", type=Path, help="JSON of odeadv evaluate, the folder of a run, or its record")
    sub.add_argument("b", type=Path, help="another result, for the same images and attacks")
    sub.add_argument("--protocol", default="table2", help="protocol of the evaluation in a run (default: table2)")
    sub.add_argument("--weights", choices=("last", "best"), default="last", help="weights in a run (default: last)")
    sub.add_argument("--json", action="store_true", help="as JSON")


def compare(args: argparse.Namespace) -> int:
    """Compare two evaluations image by image."""
    from odeadv.evaluation import compare
    from odeadv.experiments import read_evaluation

    tests = compare(*(read_evaluation(path, args.protocol, args.weights) for path in (args.a, args.b)))
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


def add_audit(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `odeadv audit`."""
    _add_network(sub, "audit")
    sub.add_argument(
        "--images", type=int, help="test images, balanced over the classes (default: 500, or all if fewer)"
    )
    sub.add_argument("--batch-size", type=int, default=128, help="images in one forward pass (default: 128)")
    sub.add_argument("--norm", choices=("linf", "l2"), default="linf", help="norm of the ball (default: linf)")
    sub.add_argument(
        "--eps",
        help="radius: for linf in 1/255 (default: 8; 8/255 means the same), for l2 in pixel units of [0, 1] (default: "
        "0.5)",
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of the random numbers of the checks (default: 0)")
    sub.add_argument("--surrogate", help="another NETWORK; its adversarial images are tried on this network")
    sub.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for the page, its JSON and plots (default: audit in the run's folder; your own network "
        "needs --out for a page)",
    )  # fmt: skip


def audit(args: argparse.Namespace) -> int:
    """Check a network by the checklist for trustworthy attacks; return status 1 if a line fails."""
    from odeadv.experiments import audit_run

    eps = None if args.eps is None else radius("eps", args.eps, args.norm)
    result, out = audit_run(
        eps=eps, norm=args.norm, seed=args.seed, surrogate=args.surrogate, out=args.out,
        progress=lambda check: print(f"odeadv audit: {check} ...", file=sys.stderr, flush=True), **_network(args)
    )  # fmt: skip
    print(result)
    if out is not None:
        print(out)
    return 0 if result.passed else 1


def add_diagnose(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `odeadv diagnose`."""
    sub.add_argument("checkpoint", help="a run's folder, or its weights, or the name of a network of the package")
    sub.add_argument("--other", help="another one for the same page, with the same images, such as a run without LAD")
    sub.add_argument(
        "--attack", metavar="EPS",
        help="follow the perturbation of FGSM with this radius in 1/255 (8 or 8/255), not a random perturbation",
    )  # fmt: skip
    sub.add_argument("--images", type=int, default=128, help="test images, balanced over the classes (default: 128)")
    sub.add_argument(
        "--eta", type=float, help="eta for all networks (default: that of their training, or of the other)"
    )
    sub.add_argument("--out", type=Path, help="folder for the page (default: diagnostics in the run's folder)")
    add_data(sub)


def diagnose(args: argparse.Namespace) -> int:
    """Measure the dynamics of trained weights and write a page."""
    from odeadv.experiments import diagnose_run

    out, etas = diagnose_run(
        args.checkpoint, args.other, folder=args.data, images=args.images, eta=args.eta, out=args.out,
        attack_255=None if args.attack is None else 255 * radius("attack", args.attack),
    )  # fmt: skip
    if args.eta is None and not any(etas):
        print("odeadv diagnose: trained without a defence, so eta is 0; --eta measures another", file=sys.stderr)
    print(out)
    return 0
