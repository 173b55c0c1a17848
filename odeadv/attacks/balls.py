"""The sets that attacks stay in, by norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, Protocol

from torch import Tensor

from odeadv.attacks._l2 import L2Ball
from odeadv.attacks._linf import linf_bounds

Norm = Literal["linf", "l2"]


class Ball(Protocol):
    """The images that are allowed around clean ones: a ball of some norm, within [0, 1]."""

    def project(self, x: Tensor) -> Tensor:
        """Allowed images near ``x``; same shape, dtype and memory format as ``x``."""

    def ascend(self, x: Tensor, gradient: Tensor, alpha: float | Tensor) -> Tensor:
        """``x`` after the step of length ``alpha``, in this norm, that raises a function of this gradient most."""

    def rows(self, index: Tensor) -> Ball:
        """The set around the images ``index`` only."""


BALLS: Mapping[str, Callable[[Tensor, float], Ball]] = MappingProxyType({"linf": linf_bounds, "l2": L2Ball})
