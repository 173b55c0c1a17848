"""Which attacks an evaluation runs: data, and the protocols of the paper's tables."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from odeadv.attacks._checks import non_negative, positive_integer

AttackName = Literal["fgsm", "ifgsm"]


@dataclass(frozen=True)
class AttackSpec:
    """One attack of a protocol.

    Attributes:
        name: ``"fgsm"`` (then ``alpha`` is ``eps`` and ``steps`` is 1) or ``"ifgsm"``.
        eps: radius of the L-infinity ball, in pixel units of [0, 1].
        alpha: size of one step, in the same units.
        steps: number of steps.

    Raises:
        TypeError: if a number is of the wrong type.
        ValueError: if the name is unknown or a number is out of range.
    """

    name: AttackName
    eps: float
    alpha: float
    steps: int

    def __post_init__(self) -> None:
        if self.name not in get_args(AttackName):
            raise ValueError(f"name: got {self.name!r}, expected 'fgsm' or 'ifgsm'")
        for field in ("eps", "alpha"):
            object.__setattr__(self, field, non_negative(field, getattr(self, field)))
        object.__setattr__(self, "steps", positive_integer("steps", self.steps))
        if self.name == "fgsm" and (self.alpha, self.steps) != (self.eps, 1):
            raise ValueError(
                f"alpha, steps: got {self.alpha!r}, {self.steps!r}, expected {self.eps!r} (eps), 1 for 'fgsm'"
            )


@dataclass(frozen=True)
class Protocol:
    """A named sequence of attacks; clean accuracy always belongs to it.

    Attributes:
        name: what the result calls it.
        attacks: at least one, in the order they are reported.

    Raises:
        TypeError: if ``attacks`` is not a tuple of `AttackSpec`.
        ValueError: if it is empty.
    """

    name: str
    attacks: tuple[AttackSpec, ...]

    def __post_init__(self) -> None:
        _check_attacks(self.attacks)


def _check_attacks(attacks: object) -> None:
    if not isinstance(attacks, tuple) or not all(isinstance(spec, AttackSpec) for spec in attacks):
        raise TypeError(f"attacks: got {attacks!r}, expected a tuple of AttackSpec")
    if not attacks:
        raise ValueError("attacks: got none, expected at least one AttackSpec")


def _fgsm_and_ifgsm_20(name: str, *, eps: tuple[float, ...], alpha: float) -> Protocol:
    fgsm = tuple(AttackSpec("fgsm", radius, radius, 1) for radius in eps)
    return Protocol(name, fgsm + tuple(AttackSpec("ifgsm", radius, alpha, 20) for radius in eps))


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            _fgsm_and_ifgsm_20("table1", eps=(0.5 / 255, 1 / 255), alpha=0.5 / 255),
            _fgsm_and_ifgsm_20("table2", eps=(8 / 255, 12 / 255), alpha=2 / 255),
            Protocol("table6", tuple(AttackSpec("ifgsm", 8 / 255, 2 / 255, steps) for steps in (20, 100, 1000))),
        )
    }
)
"""The paper's protocols by table number; ``"table2"`` is also that of Tables 3, 4, 5 and 7."""


def resolve_protocol(protocol: object) -> Protocol:
    """The protocol that ``protocol`` is or names; ValueError for an unknown name, TypeError for anything else."""
    if isinstance(protocol, Protocol):
        return protocol
    if not isinstance(protocol, str):
        raise TypeError(f"protocol: got {protocol!r}, expected a Protocol or one of {', '.join(PROTOCOLS)}")
    if protocol not in PROTOCOLS:
        near = "".join(f"; did you mean {name!r}?" for name in difflib.get_close_matches(protocol, PROTOCOLS, n=1))
        raise ValueError(f"protocol: got {protocol!r}, expected one of {', '.join(PROTOCOLS)}{near}")
    return PROTOCOLS[protocol]
