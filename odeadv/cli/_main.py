"""The command ``odeadv``: train, tune, evaluate, compare, list, tabulate, report, rerun, audit and diagnose.

It only parses arguments and prints; the other packages do the work.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from odeadv._version import __version__
from odeadv.support.checks import did_you_mean

from . import _evaluate, _shared, _table, _train

_Add = Callable[[argparse.ArgumentParser], None]
_Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    The status is 0 for success, 1 if a run or a check failed, 2 if the arguments are wrong, and 130 after Ctrl-C.
    """
    try:
        parser = _parser()
    except ModuleNotFoundError as error:  # a package of the extra "train" is missing
        print(f"odeadv: error: {error}", file=sys.stderr)
        return 2
    args, unknown = parser.parse_known_args(arguments)
    if unknown:  # argparse reports them without the command
        command = f" {args.command}" if args.command else ""
        print(f"odeadv{command}: error: unrecognized arguments: {' '.join(unknown)}", file=sys.stderr)
        print(f"odeadv{command} --help lists the arguments", file=sys.stderr)
        return 2
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a configuration can name an objective in a local module
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print(f"odeadv {args.command}: stopped; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"odeadv {args.command}: error: {_in_options(str(error))}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # the run diverged, or another process locks it
        print(f"odeadv {args.command}: {error}", file=sys.stderr)
        return 1
    return status


def _in_options(message: str) -> str:
    """Return the error message with the argument name replaced by its command-line name."""
    argument, colon, rest = message.partition(":")
    return {"root": "data", "test": "images"}.get(argument, argument) + colon + rest


class _Parser(argparse.ArgumentParser):
    """A parser whose errors name the nearest choice instead of printing the usage of every option."""

    def error(self, message: str) -> NoReturn:
        """Print the error with a hint, and exit with status 2."""
        found = re.search(r"invalid choice: '?([^' ]+)'? \(choose from (.*)\)", message)
        hint = did_you_mean(found[1], re.findall(r"[\w-]+", found[2])) if found else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}\n{self.prog} --help lists the arguments\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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


# Command name: (help, epilog, function that adds the arguments, function that runs the command).
COMMANDS: dict[str, tuple[str, str | None, _Add, _Run]] = {
    "train": ("train one network; a stopped training resumes", _shared.KEYS, _train.add_train, _train.train),
    "tune": (
        "choose eta by cross-validation on the training set (Appendix B.1)",
        "For the keys of the configuration see odeadv train --help.", _train.add_tune, _train.tune,
    ),
    "evaluate": (
        "evaluate trained weights or your own network: clean and robust accuracy",
        _evaluate.ATTACKS, _evaluate.add_evaluate, _evaluate.evaluate,
    ),
    "compare": ("compare two evaluations image by image (McNemar)", None, _evaluate.add_compare, _evaluate.compare),
    "runs": ("list the runs in a folder: state, progress and accuracy", None, _train.add_runs, _train.runs),
    "table": ("make the missing runs of a table and report it", None, _table.add_table, _table.table),
    "report": (
        "make a page and its plot again from the JSON records of its runs",
        None, _table.add_report, _table.report,
    ),
    "rerun": (
        "repeat the run of a record and compare the results; exit status 1 if they differ",
        None, _train.add_rerun, _train.rerun,
    ),
    "audit": (
        "check the attacks on a network by a checklist and write a page; exit status 1 if a line fails",
        None, _evaluate.add_audit, _evaluate.audit,
    ),
    "diagnose": (
        "measure the dynamics of trained weights (Eq. 16, Theorems 3.2 and 3.3) and write a page",
        None, _evaluate.add_diagnose, _evaluate.diagnose,
    ),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
