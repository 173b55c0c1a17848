"""Models by name, for configuration files and checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from odeadv.models._mlp import residual_mlp
from odeadv.models._network import FieldNetwork
from odeadv.models._ode import ode_net
from odeadv.models._refine import Refined
from odeadv.models._resnet import preact_resnet, resnet20, resnet56
from odeadv.support.checks import choice, did_you_mean


def build(name: str, *, generator: torch.Generator | None = None, **arguments: Any) -> FieldNetwork:
    """Return the model with the name ``name``. ``build(**net.config)`` has the same architecture as ``net``.

    Args:
        name: one of `names`.
        generator: source of the initial weights; by default the global random state.
        arguments: the arguments of the model, as plain values.

    Raises:
        TypeError: if the model does not take an argument, or if one is missing.
        ValueError: if the name is unknown, or an argument is out of range.
    """
    make = _MODELS[choice("model", name, _MODELS)]
    known = inspect.signature(make).parameters
    for argument in arguments:
        if argument not in known:
            others = [other for other in known if other != "generator"]
            raise TypeError(
                f"model: got {argument!r} for {name!r}, expected its arguments {', '.join(others)}"
                f"{did_you_mean(argument, others)}"
            )
    for argument, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and argument not in arguments:
            raise TypeError(f"model: got no {argument!r} for {name!r}, which needs one")
    return make(generator=generator, **arguments)


def names() -> tuple[str, ...]:
    """Return the names of all models that `build` makes."""
    return tuple(_MODELS)


def _refined(
    net: Mapping[str, Any],
    k: int,
    substep: str | Mapping[str, Any] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Refined:
    return Refined(build(**net, generator=generator), k, substep=substep)


_MODELS: dict[str, Callable[..., FieldNetwork]] = {
    "preact_resnet": preact_resnet,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "residual_mlp": residual_mlp,
    "ode_net": ode_net,
    "refined": _refined,
}
