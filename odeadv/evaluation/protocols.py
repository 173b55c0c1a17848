"""Which attacks an evaluation runs: data, and the protocols of the paper's tables."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from odeadv import attacks as _attacks
from odeadv.attacks.checks import radius
from odeadv.support.checks import integer, number
from odeadv.support.digests import described_function

Score = Literal["last", "worst"]
AUTOATTACK = "autoattack"
_RESERVED = ("eps", "alpha", "steps", "generator", "mode", "tally", "target")  # fields, or the evaluation's own
_AUTOATTACK_OPTIONS = ("norm", "version", "attacks")


def radius_text(eps: float, options: Mapping[str, Any]) -> str:
    """A radius as labels have it: ``8/255``, or ``0.5 in L2`` (an L2 radius is no number of grey levels)."""
    return f"{eps:g} in L2" if options.get("norm") in ("l2", "L2") else f"{round(255 * eps, 6):g}/255"


@dataclass(frozen=True)
class AttackSpec:
    """One attack of a protocol: a function of `odeadv.attacks` by name with its arguments, or ``"autoattack"``.

    Attributes:
        name: ``"fgsm"`` (then ``alpha`` is ``eps`` and ``steps`` is 1), ``"ifgsm"``, any other function of
            `odeadv.attacks` that takes ``eps``, or ``"autoattack"``.
        eps: radius of the ball, in pixel units of [0, 1].
        alpha: size of one step, in the same units; None where the attack has none.
        steps: number of steps; None where the attack has none, or for its default.
        score: ``"last"`` scores the images that the attack ends with, on every example. ``"worst"`` only asks
            whether the clean image and everything the attack tried are right: an example is dropped as soon as it
            is fooled, which is much cheaper and a stricter count. AutoAttack is always ``"worst"``.
        options: further keyword arguments of the attack (``restarts``, ``loss``, ...); for AutoAttack ``norm``,
            ``version`` and, with version ``"custom"``, ``attacks``.

    Raises:
        TypeError: if a value is of the wrong type.
        ValueError: if the name or an option is unknown or a number is out of range.
    """

    name: str
    eps: float
    alpha: float | None = None
    steps: int | None = None
    score: Score = "last"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        function = None if self.name == AUTOATTACK else attack_function(self.name)
        if not isinstance(self.options, Mapping) or not all(isinstance(key, str) for key in self.options):
            raise TypeError(f"options: got {self.options!r}, expected a mapping from argument names to values")
        if self.score not in ("last", "worst"):
            raise ValueError(f"score: got {self.score!r}, expected 'last' or 'worst'")
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        object.__setattr__(self, "eps", radius(self.eps, self.options.get("norm", "linf")))
        if self.name == "fgsm":
            self._fill_fgsm()
        if self.alpha is not None or self.name == "ifgsm":
            object.__setattr__(self, "alpha", number("alpha", self.alpha, least=0))
        if self.steps is not None or self.name == "ifgsm":
            object.__setattr__(self, "steps", integer("steps", self.steps))
        if function is None:
            self._check_autoattack()
        else:
            self._check_arguments(function)

    def __reduce__(self) -> tuple[object, ...]:
        # A read-only view of a mapping can be neither pickled nor copied.
        return AttackSpec, (self.name, self.eps, self.alpha, self.steps, self.score, dict(self.options))

    @property
    def shared(self) -> bool:
        """Whether it is plain FGSM or IFGSM, whose gradients and iterates are shared with the other attacks."""
        return self.name in ("fgsm", "ifgsm") and not self.options

    @property
    def measures_worst(self) -> bool:
        """Whether worst-so-far outcomes come with it; not where only a last iterate of several is returned."""
        if self.shared or self.score == "worst":
            return True
        return not takes(attack_function(self.name), "keep") or self.options.get("keep") == "worst"

    @property
    def label(self) -> str:
        """A short name: ``ifgsm-20 at 8/255``, with ``(worst so far)`` where that is the score."""
        steps = f"-{self.steps}" if self.steps is not None and self.name != "fgsm" else ""
        score = " (worst so far)" if self.score == "worst" else ""
        return f"{self.name}{steps} at {radius_text(self.eps, self.options)}{score}"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for the attack, without its generator."""
        own = {"eps": self.eps, "alpha": self.alpha, "steps": self.steps}
        if self.name == "fgsm":
            own = {"eps": self.eps}
        return {key: value for key, value in own.items() if value is not None} | dict(self.options)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data; functions are written by name (local ones with a digest), other objects by ``repr``."""
        options = {key: _plain(value) for key, value in self.options.items()}
        own = {"name": self.name, "eps": self.eps, "alpha": self.alpha, "steps": self.steps}
        return {**own, "score": self.score, "options": options}

    def _fill_fgsm(self) -> None:
        for name, value in (("alpha", self.eps), ("steps", 1)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if (self.alpha, self.steps) != (self.eps, 1):
            raise ValueError(
                f"alpha, steps: got {self.alpha!r}, {self.steps!r}, expected {self.eps!r} (eps), 1 for 'fgsm'"
            )

    def _check_autoattack(self) -> None:
        if self.alpha is not None or self.steps is not None:
            raise ValueError(
                f"alpha, steps: got {self.alpha!r}, {self.steps!r}, expected None: AutoAttack chooses them"
            )
        _check_known("options", self.options, _AUTOATTACK_OPTIONS)
        object.__setattr__(self, "score", "worst")

    def _check_arguments(self, function: Callable[..., Tensor]) -> None:
        known = _keywords(function)
        if "eps" not in known:
            raise ValueError(f"name: got {self.name!r}, expected an attack with a radius eps")
        _check_known("options", self.options, [key for key in known if key not in _RESERVED])
        if self.score == "worst" and self.options.get("keep", "worst") != "worst":
            raise ValueError(f"options: got keep={self.options['keep']!r}, expected 'worst' or none for score='worst'")
        given = self.arguments()
        for key in ("alpha", "steps"):
            if key in given and key not in known:
                raise ValueError(f"{key}: got {given[key]!r}, expected None: {self.name!r} has no {key}")
        required = [key for key, parameter in known.items() if parameter.default is parameter.empty]
        missing = [key for key in required if key not in given and key not in _RESERVED[3:]]
        if missing:
            raise ValueError(f"{missing[0]}: missing, expected a value for the attack {self.name!r}")


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
        if not isinstance(self.attacks, tuple) or not all(isinstance(spec, AttackSpec) for spec in self.attacks):
            raise TypeError(f"attacks: got {self.attacks!r}, expected a tuple of AttackSpec")
        if not self.attacks:
            raise ValueError("attacks: got none, expected at least one AttackSpec")


def attack_function(name: object) -> Callable[..., Tensor]:
    """The function of `odeadv.attacks` called ``name``; ValueError, with near matches, if there is none."""
    names = [*(key for key in _attacks.__all__ if _is_attack(getattr(_attacks, key))), AUTOATTACK]
    if not isinstance(name, str) or name not in names:
        near = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(names)}{hint}")
    function: Callable[..., Tensor] = getattr(_attacks, name)
    return function


def takes(function: Callable[..., Tensor], argument: str) -> bool:
    """Whether the attack has a keyword argument of that name."""
    return argument in _keywords(function)


def _is_attack(value: object) -> bool:
    return inspect.isfunction(value) and "eps" in _keywords(value)


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {key: value for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY}


def _check_known(name: str, given: Mapping[str, object], known: Collection[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{name}: got {key!r}, expected some of {', '.join(known)}")


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return described_function(value)


def _fgsm_and_ifgsm_20(name: str, *, eps: tuple[float, ...], alpha: float) -> Protocol:
    fgsm = tuple(AttackSpec("fgsm", radius) for radius in eps)
    return Protocol(name, fgsm + tuple(AttackSpec("ifgsm", radius, alpha, 20) for radius in eps))


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            _fgsm_and_ifgsm_20("table1", eps=(0.5 / 255, 1 / 255), alpha=0.5 / 255),
            _fgsm_and_ifgsm_20("table2", eps=(8 / 255, 12 / 255), alpha=2 / 255),
            _fgsm_and_ifgsm_20("eps4", eps=(4 / 255, 6 / 255), alpha=1 / 255),
            Protocol("table6", tuple(AttackSpec("ifgsm", 8 / 255, 2 / 255, steps) for steps in (20, 100, 1000))),
            Protocol("autoattack", (AttackSpec(AUTOATTACK, 8 / 255),)),
        )
    }
)
"""The paper's protocols by table number; ``"table2"`` is also that of Tables 3, 4, 5 and 7.

``"eps4"`` is Table 2 at half its radii and step size; ``"autoattack"`` is AutoAttack at 8/255.
"""


def resolve_protocol(protocol: object) -> Protocol:
    """The protocol that ``protocol`` is or names; ValueError for an unknown name, TypeError for anything else."""
    if isinstance(protocol, Protocol):
        return protocol
    if not isinstance(protocol, str):
        raise TypeError(f"protocol: got {protocol!r}, expected a Protocol or one of {', '.join(PROTOCOLS)}")
    if protocol in ("table3", "table4", "table5", "table7"):  # the paper evaluates them as Table 2
        protocol = "table2"
    if protocol not in PROTOCOLS:
        near = "".join(f"; did you mean {name!r}?" for name in difflib.get_close_matches(protocol, PROTOCOLS, n=1))
        raise ValueError(f"protocol: got {protocol!r}, expected one of {', '.join(PROTOCOLS)}{near}")
    return PROTOCOLS[protocol]


def require_packages(protocol: Protocol) -> None:
    """Import what its attacks need, or raise the ImportError that says how to get it."""
    if any(spec.name == AUTOATTACK for spec in protocol.attacks):
        pyautoattack()


def pyautoattack() -> Any:
    """Import `pyautoattack.AutoAttack`; ImportError says how to install it."""
    try:
        return importlib.import_module("pyautoattack").AutoAttack
    except ImportError as error:
        raise ImportError("protocol 'autoattack' needs the package pyautoattack: pip install pyautoattack") from error
