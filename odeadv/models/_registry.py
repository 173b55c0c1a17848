"""Models by name, for configuration files and checkpoints."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from odeadv.models._network import FieldNetwork
from odeadv.models._ode import ode_net
from odeadv.models._refine import Refined
from odeadv.models._resnet import preact_resnet, resnet20, resnet56


def build(name: str, *, generator: torch.Generator | None = None, **arguments: Any) -> FieldNetwork:
    """The model called ``name``; ``build(**net.config)`` makes one of the architecture of ``net``.

    Args:
        name: one of `names`.
        generator: source of the initial weights; the global random state if not given.
        arguments: those of the model, plain values.

    Raises:
        TypeError: if the model has no such argument, naming near matches, or if one is missing.
        ValueError: for an unknown name, naming near matches, and for arguments out of range.
    """
    if name not in _MODELS:
        raise ValueError(f"model: {name!r} is not known; {_near(name, _MODELS)}known: {', '.join(_MODELS)}")
    make = _MODELS[name]
    known = inspect.signature(make).parameters
    for argument in arguments:
        if argument not in known:
            others = [other for other in known if other != "generator"]
            raise TypeError(
                f"model: {name!r} has no argument {argument!r}; {_near(argument, others)}it has {', '.join(others)}"
            )
    for argument, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and argument not in arguments:
            raise TypeError(f"model: {name!r} needs {argument!r}, which is not given")
    return make(generator=generator, **arguments)


def names() -> tuple[str, ...]:
    """The models that `build` knows."""
    return tuple(_MODELS)


def _refined(
    net: Mapping[str, Any],
    k: int,
    substep: str | Mapping[str, Any] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Refined:
    return Refined(build(**net, generator=generator), k, substep=substep)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=2)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


_MODELS: dict[str, Callable[..., FieldNetwork]] = {
    "preact_resnet": preact_resnet,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "ode_net": ode_net,
    "refined": _refined,
}
