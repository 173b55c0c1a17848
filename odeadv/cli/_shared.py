"""Arguments and texts that several commands share."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from odeadv.experiments import RunConfig

# A radius below this one, given in 1/255, is meant in units of 1: 8/255 is 0.031, and nobody attacks by 0.1/255.
_SMALLEST_255THS = 0.1

KEYS = """
The configuration of a run has the keys data, model and training; missing keys have their default values. In YAML:

    data: {name: cifar10, train_images: 5000, validation_images: 1000}
    model: {depth: 20, width: 16, damping: lambda-damp}
    training:
      objective: {name: pgd, eps: 8/255, alpha: 2/255, steps: 10}
      defence: {name: layerwise, scheme: strang, eta: 50}
      epochs: 30
      milestones: [15, 22]
      precision: bf16

Objectives: natural, pgd, trades, mart, awp, or "package.module:Class". Defences: none, penalty, layerwise (scheme: lie
is LAD, strang is LAD-SM, strang-midpoint the exact midpoint), or "package.module:Class". `odeadv train --method pgd+lad
--print-config` prints a complete configuration. An unknown key is an error.
"""


def listed(title: str, texts: Mapping[str, str]) -> str:
    """Return names and their texts as lines for the end of a help page."""
    width = max(map(len, texts))
    lines = (
        textwrap.fill(text, 78, initial_indent=f"  {name:{width}}  ", subsequent_indent=" " * (width + 4))
        for name, text in texts.items()
    )
    return "\n".join((f"{title}:", *lines, "", ""))


def radius(name: str, text: str, norm: str = "linf") -> float:
    """Return a radius of the command line in pixel units of [0, 1]: ``"8"`` or ``"8/255"``, or for L2 a length.

    Args:
        name: the argument's name, for the message.
        text: the text of the argument.
        norm: ``"linf"`` or ``"l2"``.

    Raises:
        ValueError: if ``text`` is not a number, or so small that it is not in units of 1/255.
    """
    expected = "a radius in 1/255, such as 8 or 8/255" if norm == "linf" else "a length in pixel units, such as 0.5"
    digits, slash, unit = text.partition("/")
    try:
        value = float(digits)
    except ValueError:
        value = math.nan
    if not value >= 0 or (slash and (norm != "linf" or unit.strip() != "255")):
        raise ValueError(f"{name}: got {text}, expected {expected}")
    if norm != "linf":
        return value
    if 0 < value < _SMALLEST_255THS and not slash:
        raise ValueError(f"{name}: got {text}, expected {expected}; {text} in pixel units is {255 * value:g}/255")
    return value / 255


def add_data(sub: argparse.ArgumentParser) -> None:
    """Add the argument for the folder of the data sets."""
    sub.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets, also for downloads")


def add_config(sub: argparse.ArgumentParser) -> None:
    """Add the arguments that describe a run: a file, or a method and a preset."""
    from odeadv import data
    from odeadv.experiments import PRESETS

    sub.add_argument("config", nargs="?", type=Path, help="a .yaml or .json file (see below)")
    sub.add_argument("--method", help="method instead of a file: natural, pgd+lad, trades+lad-sm, pgd+lad+noise, ...")
    sub.add_argument("--preset", choices=PRESETS, help="size of the run of --method (default: smoke)")
    sub.add_argument("--dataset", choices=data.names(), help="data set for --method (default: the preset's)")
    sub.add_argument("--seed", type=int, help="seed (default: the seed of the file, or 0 for --method)")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a value, such as training.lr=0.05"
    )
    add_data(sub)


def read_config(
    file: Path | None,
    method: str | None,
    preset: str | None,
    dataset: str | None,
    seed: int | None,
    assignments: list[str],
) -> RunConfig:
    """Return the configuration that the arguments of `add_config` describe.

    Raises:
        ValueError, TypeError, OSError: if an argument is wrong; the message names it.
    """
    from odeadv import experiments
    from odeadv.support import plain

    if (file is None) == (method is None):
        raise ValueError("config: give either a configuration file or --method")
    if file is not None:
        if preset is not None or dataset is not None:
            raise ValueError("preset, dataset: got one for a configuration file, which has its own; change it by --set")
        if not file.is_file():
            what = "is a folder, expected a file such as its config.json" if file.is_dir() else "does not exist"
            raise FileNotFoundError(f"config: {file} {what}")
        config = experiments.load_config(file)
        if seed is not None:
            config = replace(config, training=replace(config.training, seed=seed))
    else:
        assert method is not None
        size = experiments.PRESETS[preset or "smoke"]
        objective = experiments.parse_method(method).objective
        config = experiments.configuration(
            experiments.Row(method), size.sizes[objective], dataset or size.dataset, seed or 0
        )
    return experiments.RunConfig.from_dict(plain.override(config.to_dict(), assignments))


def config_of(args: argparse.Namespace) -> RunConfig:
    """Return the configuration that the parsed arguments describe."""
    return read_config(args.config, args.method, args.preset, args.dataset, args.seed, args.set)


def percent(share: float | None) -> str:
    """Return a share in %, or "-" for None (an attack that is scored only by its worst iterate)."""
    return "-" if share is None else f"{100 * share:.2f}"
