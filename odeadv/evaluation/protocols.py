"""Protocols: the attacks of an evaluation as data, and the protocols of the paper's tables."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from torch import Tensor

from odeadv import attacks as _attacks
from odeadv.attacks.checks import radius
from odeadv.attacks.objective import TargetName
from odeadv.support.checks import choice, did_you_mean, integer, number, shown
from odeadv.support.digests import function_name, is_local

Score = Literal["last", "worst"]
AUTOATTACK = "autoattack"
_RESERVED = ("eps", "alpha", "steps", "generator", "mode", "tally")  # fields, or set by the evaluation
_AUTOATTACK_OPTIONS = ("norm", "version", "attacks")


def radius_text(eps: float, options: Mapping[str, Any]) -> str:
    """Return a radius as labels show it: ``8/255``; or ``0.5 in L2``, because grey levels measure L-infinity only."""
    return f"{round(255 * eps, 6):g}/255" if in_255ths(options) else f"{eps:g} in {str(options['norm']).upper()}"


def in_255ths(options: Mapping[str, Any]) -> bool:
    """Return True if an attack with these options has an L-infinity radius."""
    return str(options.get("norm", "linf")).lower() == "linf"


def unique_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels; a label that occurs more than once is followed by its place, ``(attack 3)``."""
    # Options are not in a label, so two attacks that differ in their options only share it.
    return tuple(
        label if labels.count(label) == 1 else f"{label} (attack {place})" for place, label in enumerate(labels)
    )


@dataclass(frozen=True)
class AttackSpec:
    """One attack of a protocol: a function of `odeadv.attacks` by name with its arguments, or ``"autoattack"``.

    Attributes:
        name: ``"fgsm"`` (then ``alpha`` is ``eps`` and ``steps`` is 1), ``"ifgsm"``, any other function of
            `odeadv.attacks` that takes ``eps``, or ``"autoattack"``.
        eps: radius of the ball, in pixel units of [0, 1].
        alpha: size of one step, in the same units; None if the attack has none, or for its default.
        steps: number of steps; None if the attack has none, or for its default.
        score: ``"last"`` scores the images that the attack ends with, on every example. ``"worst"`` counts an example
            only if the clean image and everything the attack tried are right. This is stricter, and much cheaper: an
            example is dropped as soon as it is fooled. AutoAttack is always ``"worst"``.
        options: further keyword arguments of the attack (``restarts``, ``loss``, ``target="least-likely"``, ...);
            for AutoAttack ``norm``, ``version`` and, with version ``"custom"``, ``attacks``.

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
            raise TypeError(f"options: got {shown(self.options)}, expected a mapping from argument names to values")
        choice("score", self.score, ("last", "worst"))
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
        """True for plain FGSM or IFGSM, whose gradients and iterates are shared with the other attacks."""
        return self.name in ("fgsm", "ifgsm") and not self.options

    @property
    def measures_worst(self) -> bool:
        """True if the attack has worst-so-far outcomes; false if it returns only the last of several iterates."""
        if self.shared or self.score == "worst":
            return True
        return not takes(attack_function(self.name), "keep") or self.options.get("keep") == "worst"

    @property
    def label(self) -> str:
        """A short name: ``ifgsm-20 at 8/255``, with ``(worst so far)`` if that is the score."""
        steps = f"-{self.steps}" if self.steps is not None and self.name != "fgsm" else ""
        score = " (worst so far)" if self.score == "worst" else ""
        return f"{self.name}{steps} at {radius_text(self.eps, self.options)}{score}"

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for the attack, without its generator."""
        own = {"eps": self.eps, "alpha": self.alpha, "steps": self.steps}
        if self.name == "fgsm":
            own = {"eps": self.eps}
        return {key: value for key, value in own.items() if value is not None} | dict(self.options)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data; functions are written by module and name, other objects by ``repr``."""
        options = {key: _plain(value) for key, value in self.options.items()}
        own = {"name": self.name, "eps": self.eps, "alpha": self.alpha, "steps": self.steps}
        return {**own, "score": self.score, "options": options}

    def local_functions(self) -> list[str]:
        """Return the options that are lambdas or functions defined within another: their names are not unique."""
        return [key for key, value in self.options.items() if callable(value) and is_local(value)]

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
                f"alpha, steps: got {self.alpha!r}, {self.steps!r}, expected None, because AutoAttack chooses them"
            )
        _check_known("options", self.options, _AUTOATTACK_OPTIONS)
        object.__setattr__(self, "score", "worst")

    def _check_arguments(self, function: Callable[..., Tensor]) -> None:
        known = _keywords(function)
        if "eps" not in known:
            raise ValueError(f"name: got {self.name!r}, expected an attack with a radius eps")
        _check_known("options", self.options, [key for key in known if key not in _RESERVED])
        if "target" in self.options:  # a tensor belongs to certain images, not to a protocol
            choice("target", self.options["target"], get_args(TargetName))
        if self.score == "worst" and self.options.get("keep", "worst") != "worst":
            raise ValueError(f"options: got keep={self.options['keep']!r}, expected 'worst' or none for score='worst'")
        given = self.arguments()
        for key in ("alpha", "steps"):
            if key in given and key not in known:
                raise ValueError(f"{key}: got {given[key]!r}, expected None, because {self.name!r} does not take {key}")
        required = [key for key, parameter in known.items() if parameter.default is parameter.empty]
        missing = [key for key in required if key not in given and key not in _RESERVED[3:]]
        if missing:
            raise ValueError(f"{missing[0]}: missing, expected a value for the attack {self.name!r}")


@dataclass(frozen=True)
class Protocol:
    """A named sequence of attacks. Clean accuracy is always measured too.

    Attributes:
        name: what the result calls it.
        attacks: at least one, in the order of the report.

    Raises:
        TypeError: if ``attacks`` is not a tuple of `AttackSpec`.
        ValueError: if it is empty.
    """

    name: str
    attacks: tuple[AttackSpec, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.attacks, tuple) or not all(isinstance(spec, AttackSpec) for spec in self.attacks):
            raise TypeError(f"attacks: got {shown(self.attacks)}, expected a tuple of AttackSpec")
        if not self.attacks:
            raise ValueError("attacks: got none, expected at least one AttackSpec")

    @property
    def names(self) -> tuple[str, ...]:
        """A different name for each attack: its label, with its place if several attacks share the label."""
        return unique_names([spec.label for spec in self.attacks])


def attack_function(name: object) -> Callable[..., Tensor]:
    """Return the function of `odeadv.attacks` called ``name``; raise as `choice`."""
    names = [*(key for key in _attacks.__all__ if _is_attack(getattr(_attacks, key))), AUTOATTACK]
    function: Callable[..., Tensor] = getattr(_attacks, choice("name", name, names))
    return function


def takes(function: Callable[..., Tensor], argument: str) -> bool:
    """Return True if the attack has a keyword argument of that name."""
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
    return function_name(value)


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
    """Return ``protocol``, the protocol that it names, or a protocol ``"custom"`` of one attack or a list of them.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if isinstance(protocol, AttackSpec):
        return Protocol("custom", (protocol,))
    if isinstance(protocol, (list, tuple)):
        return Protocol("custom", tuple(protocol))
    names = ", ".join(PROTOCOLS)
    if not isinstance(protocol, str):
        raise TypeError(
            f"protocol: got {shown(protocol)}, expected a Protocol, an AttackSpec, a list of them, or one of {names}"
        )
    if protocol in ("table3", "table4", "table5", "table7"):  # the paper evaluates them as Table 2
        protocol = "table2"
    if protocol not in PROTOCOLS:
        hint = did_you_mean(protocol, PROTOCOLS)
        raise ValueError(f"protocol: got {protocol!r}, expected one of {names}{hint}")
    return PROTOCOLS[protocol]


def require_packages(protocol: Protocol) -> None:
    """Import the packages that its attacks need, or raise an ImportError that says how to install them."""
    if any(spec.name == AUTOATTACK for spec in protocol.attacks):
        pyautoattack()


def pyautoattack() -> Any:
    """Import `pyautoattack.AutoAttack`; ImportError says how to install it."""
    try:
        return importlib.import_module("pyautoattack").AutoAttack
    except ImportError as error:
        raise ImportError("protocol 'autoattack' needs the package pyautoattack: pip install pyautoattack") from error
