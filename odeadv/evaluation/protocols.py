"""Protocols: the attacks of an evaluation as data, and the protocols of the paper's tables."""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from odeadv import attacks as _attacks
from odeadv.attacks.balls import BALLS
from odeadv.attacks.checks import check_target, radius
from odeadv.attacks.objective import TargetName
from odeadv.support import plain
from odeadv.support.checks import choice, did_you_mean, integer, number, shown
from odeadv.support.digests import function_name, is_local, without_addresses
from odeadv.support.extras import extra

Score = Literal["last", "worst"]
Radius = tuple[float, ...] | float  # one radius per example, or one for all examples
AUTOATTACK = "autoattack"
_RESERVED = ("eps", "alpha", "steps", "generator", "mode", "tally")  # fields of AttackSpec, or set by the evaluation
_SET = {False: _RESERVED[3:], True: ("generator",)}  # arguments that the evaluation sets, also of a user's attack
_AUTOATTACK_OPTIONS = ("norm", "version", "attacks")


def radius_text(eps: Radius, options: Mapping[str, Any]) -> str:
    """Return a radius as text for labels: ``8/255``, or ``0.5 in L2`` (only L-infinity radii are given in 1/255).

    Several radii are shown as their range: ``2 to 8/255``.
    """
    ends = sorted({min(eps), max(eps)}) if isinstance(eps, tuple) else [eps]
    if in_255ths(options):
        return f"{' to '.join(f'{round(255 * end, 6):g}' for end in ends)}/255"
    return f"{' to '.join(f'{end:g}' for end in ends)} in {str(options['norm']).upper()}"


def in_255ths(options: Mapping[str, Any]) -> bool:
    """Return True if an attack with these options has an L-infinity radius."""
    return str(options.get("norm", "linf")).lower() == "linf"


def short_name(name: str) -> str:
    """Return the name of an attack for labels: ``"fgsm"``, or the function of ``"module:function"``."""
    return name.partition(" ")[0].rpartition(":")[2].rpartition(".")[2]


def unique_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels; a label that occurs more than once is followed by its place, ``(attack 3)``."""
    # A label does not contain options, so two attacks that differ only in their options have the same label.
    return tuple(
        label if labels.count(label) == 1 else f"{label} (attack {place})" for place, label in enumerate(labels)
    )


@dataclass(frozen=True)
class AttackSpec:
    """One attack of a protocol, with its arguments: a function of `odeadv.attacks`, ``"autoattack"``, or your own.

    Attributes:
        name: ``"fgsm"`` (then ``alpha`` is ``eps`` and ``steps`` is 1), ``"ifgsm"``, any other function of
            `odeadv.attacks` that takes ``eps``, or ``"autoattack"``. Or an attack of your own: a function that returns
            the attacked images, ``attack(model, images, labels, *, eps, ...)``, or ``"module:function"``. It gets those
            of ``alpha``, ``steps`` and ``options`` that are set, and a seeded ``generator`` if it takes one. Radii per
            example arrive as a float64 tensor (n,), and ``model`` is a module around yours. The images must lie in the
            ball (L-infinity, or that of its argument ``norm``) and in [0, 1].
        eps: radius of the ball, in pixel units of [0, 1]. A list, an array or a tensor gives one radius per example,
            in the order of the data.
        alpha: size of one step, in the same units, or one size per example. None means the default of the attack, or
            that the attack does not have a step size.
        steps: number of steps. None means the default of the attack, or that the attack is not iterative.
        score: ``"last"`` scores the final images of the attack, on every example. ``"worst"`` counts an example only
            if the clean image and every image that the attack tried are classified correctly. This is stricter, and
            much cheaper, because an example is dropped as soon as it is fooled. AutoAttack always uses ``"worst"``.
        options: further keyword arguments of the attack (``restarts``, ``loss``, ``norm``, ...); for AutoAttack
            ``norm``, ``version`` and, with version ``"custom"``, ``attacks``. ``target`` may be a name
            (``"least-likely"``) or one class per example of the data (a list, an array or a tensor). It may also be a
            function that maps labels to targets, both (n,) int64. A targeted attack is scored like every other attack:
            an example counts as robust if the label is still predicted.

    Raises:
        TypeError: if a value is of the wrong type.
        ValueError: if the name or an option is unknown or a number is out of range.
    """

    name: str | Callable[..., Tensor]
    eps: Radius
    alpha: Radius | None = None
    steps: int | None = None
    score: Score = "last"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.name, str) and ":" in self.name:
            object.__setattr__(self, "name", imported(self.name))
        function = None if self.name == AUTOATTACK else attack_function(self.name)
        if not isinstance(self.options, Mapping) or not all(isinstance(key, str) for key in self.options):
            raise TypeError(f"options: got {shown(self.options)}, expected a mapping from argument names to values")
        choice("score", self.score, ("last", "worst"))
        options = dict(self.options)
        own = _keywords(self.name).get("norm") if callable(self.name) else None
        if own is not None and own.default is not own.empty:
            options.setdefault("norm", own.default)
        if "target" in options:
            options["target"] = _targets(options["target"])
        object.__setattr__(self, "options", MappingProxyType(options))
        norm = options.get("norm", "linf")
        object.__setattr__(self, "eps", _each("eps", self.eps, lambda value: radius(value, norm)))
        if self.name == "fgsm":
            self._fill_fgsm()
        if self.alpha is not None or self.name == "ifgsm":
            alpha = _each("alpha", self.alpha, lambda value: number("alpha", value, least=0))
            object.__setattr__(self, "alpha", alpha)
        if self.steps is not None or self.name == "ifgsm":
            object.__setattr__(self, "steps", integer("steps", self.steps))
        if function is None:
            self._check_autoattack()
        else:
            self._check_arguments(function)

    def __reduce__(self) -> tuple[object, ...]:
        # A MappingProxyType cannot be pickled or copied, so pass a dict.
        return AttackSpec, (self.name, self.eps, self.alpha, self.steps, self.score, dict(self.options))

    @property
    def full_name(self) -> str:
        """The name as text; ``"module:function"`` for a function of your own."""
        if isinstance(self.name, str):
            return self.name
        bound = self.name if isinstance(self.name, functools.partial) else None
        function = bound.func if bound else self.name
        if not isinstance(function, types.FunctionType):
            return function_name(function)
        name = f"{function.__module__}:{function.__qualname__}"
        return f"{name} with {without_addresses((bound.args, bound.keywords))}" if bound else name

    @property
    def shared(self) -> bool:
        """True for FGSM or IFGSM without options and with one radius for all examples; such attacks share work."""
        one = isinstance(self.eps, float) and isinstance(self.alpha, float)
        return self.name in ("fgsm", "ifgsm") and one and not self.options

    @property
    def measures_worst(self) -> bool:
        """True if worst-so-far outcomes are measured; False if the attack returns only the last of several iterates."""
        if self.shared or self.score == "worst":
            return True
        if callable(self.name):
            return False
        return not takes(attack_function(self.name), "keep") or self.options.get("keep") == "worst"

    @property
    def label(self) -> str:
        """A short name: ``ifgsm-20 at 8/255``, with ``(worst so far)`` if that is the score."""
        steps = f"-{self.steps}" if self.steps is not None and self.name != "fgsm" else ""
        score = " (worst so far)" if self.score == "worst" else ""
        return f"{short_name(self.full_name)}{steps} at {radius_text(self.eps, self.options)}{score}"

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the attack without its generator; `by_example` may replace some of them."""
        own = {"eps": self.eps, "alpha": self.alpha, "steps": self.steps}
        if self.name == "fgsm":
            own = {"eps": self.eps}
        return {key: value for key, value in own.items() if value is not None} | dict(self.options)

    def by_example(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the arguments that differ between examples, one value per label; ``labels`` is (n,) int64.

        Raises:
            TypeError: if a target is not int64.
            ValueError: if the number of values is not n, or the target of an example is its label.
        """
        found: dict[str, Tensor] = {}
        for key, value in self.arguments().items():
            if key == "target" and not isinstance(value, str | None):
                made = value(labels) if callable(value) else torch.tensor(value)
                found[key] = _checked_target(made, labels)
            elif key in ("eps", "alpha") and isinstance(value, tuple):
                if len(value) != len(labels):
                    raise ValueError(f"{key}: got {len(value)} values, expected {len(labels)}, one per example")
                found[key] = torch.tensor(value, dtype=torch.float64)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data; functions are written by module and name, other objects by ``repr``."""
        options = {key: _plain(value) for key, value in self.options.items()}
        own = {"name": self.full_name, "eps": self.eps, "alpha": self.alpha, "steps": self.steps}
        return {**own, "score": self.score, "options": options}

    def local_functions(self) -> list[str]:
        """Name the functions whose names are not unique: the attack, unless a module has it, and local options."""
        found = [f"the option {key}" for key, value in self.options.items() if callable(value) and is_local(value)]
        if callable(self.name) and (is_local(self.name) or not isinstance(self.name, types.FunctionType)):
            found.append("the function")  # the name of a method or a partial does not say what it is bound to
        return [f"{what} of {self.label}" for what in found]

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
        if isinstance(self.eps, tuple):
            raise ValueError(f"eps: got {len(self.eps)} radii, expected one number for 'autoattack'")
        _check_known("options", self.options, _AUTOATTACK_OPTIONS)
        object.__setattr__(self, "score", "worst")

    def _check_arguments(self, function: Callable[..., Tensor]) -> None:
        known = _keywords(function)
        if "eps" not in known:
            raise ValueError(f"name: got {self.full_name!r}, expected an attack (model, images, labels, *, eps, ...)")
        if not _takes_anything(function):
            _check_known("options", self.options, [key for key in known if key not in _RESERVED])
        if callable(self.name):
            choice("norm", self.options.get("norm", "linf"), tuple(BALLS))
        if self.score == "worst" and self.options.get("keep", "worst") != "worst":
            raise ValueError(f"options: got keep={self.options['keep']!r}, expected 'worst' or none for score='worst'")
        given = self.arguments()
        for key in ("alpha", "steps"):
            if key in given and key not in known:
                raise ValueError(
                    f"{key}: got {given[key]!r}, expected None, because {self.full_name!r} does not take {key}"
                )
        required = [key for key, parameter in known.items() if parameter.default is parameter.empty]
        missing = [key for key in required if key not in given and key not in _SET[callable(self.name)]]
        if missing:
            raise ValueError(f"{missing[0]}: missing, expected a value for the attack {self.full_name!r}")


@dataclass(frozen=True)
class Protocol:
    """A named sequence of attacks. Clean accuracy is always measured too.

    Attributes:
        name: name of the protocol in the result.
        attacks: at least one attack, in the order of the report.

    Raises:
        TypeError: if ``attacks`` is not a tuple of `AttackSpec`.
        ValueError: if ``attacks`` is empty.
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


def imported(name: str) -> Callable[..., Tensor]:
    """Return the function ``"module:function"``; raise ValueError if it cannot be imported."""
    try:
        found: Callable[..., Tensor] = plain.named(name)
    except Exception as error:  # the module may raise any error
        raise ValueError(f"name: {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"name: {name!r} is {shown(found)}, expected a function")
    return found


def attack_function(name: object) -> Callable[..., Tensor]:
    """Return the function of `odeadv.attacks` called ``name``, or ``name`` itself if it is a function.

    Raises:
        ValueError: if the name is unknown.
    """
    if callable(name):
        return name
    function: Callable[..., Tensor] = getattr(_attacks, choice("name", name, _names()))
    return function


def _names() -> list[str]:
    return [*(key for key in _attacks.__all__ if _is_attack(getattr(_attacks, key))), AUTOATTACK]


def takes(function: Callable[..., Tensor], argument: str) -> bool:
    """Return True if the attack ``function`` has a keyword argument called ``argument``."""
    return argument in _keywords(function)


def _is_attack(value: object) -> bool:
    return inspect.isfunction(value) and "eps" in _keywords(value)


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters after model, images and labels, which may be passed by keyword."""
    try:
        parameters = [*inspect.signature(function).parameters.items()][3:]
    except ValueError:  # a function that is written in C
        raise ValueError(f"name: got {shown(function)}, expected a Python function") from None
    return {key: value for key, value in parameters if value.kind in (value.KEYWORD_ONLY, value.POSITIONAL_OR_KEYWORD)}


def _takes_anything(function: Callable[..., Any]) -> bool:
    return any(value.kind is value.VAR_KEYWORD for value in inspect.signature(function).parameters.values())


def _each(name: str, value: Any, checked: Callable[[Any], float]) -> Radius:
    """Apply ``checked`` to a number, or to each number of a list, array or tensor; return a float or a tuple."""
    several = _listed(value)
    if several is None:
        return checked(value)
    if not several:
        raise ValueError(f"{name}: got no values, expected a number, or one per example")
    return tuple(checked(each) for each in several)


def _listed(value: Any) -> list[Any] | None:
    """Return the items of a list, tuple, array or tensor; None for other values."""
    if isinstance(value, list | tuple | range):
        return list(value)
    if getattr(value, "ndim", 0) and hasattr(value, "tolist"):  # value is a tensor or an array
        return list(value.tolist())
    return None


def _targets(value: Any) -> Any:
    """Return a target as the name of a rule, a function, or a tuple with one class per example."""
    if value is None or callable(value):
        return value
    several = _listed(value)
    if several is None:
        if value not in get_args(TargetName):
            names = " or ".join(map(repr, get_args(TargetName)))
            kind = ValueError if isinstance(value, str) else TypeError
            raise kind(
                f"target: got {shown(value)}, expected {names}, one class per example, or a function of the labels"
                f"{did_you_mean(value, get_args(TargetName))}"
            )
        return value
    return tuple(integer("target", each, least=0) for each in several)


def _checked_target(target: object, labels: Tensor) -> Tensor:
    if isinstance(target, Tensor):
        target = target.to(labels.device)
    found = check_target(target, labels)
    if found is None:
        raise TypeError("target: the function returned None, expected int64 classes, one per label")
    return found


def _check_known(name: str, given: Mapping[str, object], known: Collection[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{name}: got {key!r}, expected some of {', '.join(known) or 'none'}")


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return function_name(value)


def _fgsm_and_ifgsm_20(name: str, *, eps: tuple[float, ...], alpha: float) -> Protocol:
    fgsm = tuple(AttackSpec("fgsm", radius) for radius in eps)
    return Protocol(name, fgsm + tuple(AttackSpec("ifgsm", radius, alpha, 20) for radius in eps))


def _ifgsm_of_more_steps(name: str, *, eps: float, alpha: float) -> Protocol:
    return Protocol(name, tuple(AttackSpec("ifgsm", eps, alpha, steps) for steps in (20, 100, 1000)))


#: The protocols of the paper and AutoAttack, by name.
PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            _fgsm_and_ifgsm_20("table1", eps=(0.5 / 255, 1 / 255), alpha=0.5 / 255),
            _fgsm_and_ifgsm_20("table2", eps=(8 / 255, 12 / 255), alpha=2 / 255),
            _fgsm_and_ifgsm_20("eps4", eps=(4 / 255, 6 / 255), alpha=1 / 255),
            _ifgsm_of_more_steps("table6", eps=8 / 255, alpha=2 / 255),
            _ifgsm_of_more_steps("eps4-steps", eps=4 / 255, alpha=1 / 255),
            Protocol("autoattack", (AttackSpec(AUTOATTACK, 8 / 255),)),
        )
    }
)
"""The paper's protocols by table number; Tables 3, 4, 5 and 7 also use ``"table2"``.

``"eps4"`` and ``"eps4-steps"`` are ``"table2"`` and ``"table6"`` with half their radii and step sizes. ``"autoattack"``
is AutoAttack at 8/255.
"""


def resolve_protocol(protocol: object) -> Protocol:
    """Return the protocol for a `Protocol`, the name of one, an attack, or a list of attacks.

    An attack or a list of attacks gives a protocol called ``"custom"``.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if ``protocol`` is of another type.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if isinstance(protocol, AttackSpec):
        return Protocol("custom", (protocol,))
    if isinstance(protocol, (list, tuple)):
        return Protocol("custom", tuple(protocol))
    names = ", ".join(PROTOCOLS)
    if not isinstance(protocol, str):
        expected = f"a Protocol, an AttackSpec, a list of them, or one of {names}"
        pair = "; images and labels are a pair: evaluate(net, (images, labels))" if isinstance(protocol, Tensor) else ""
        raise TypeError(f"protocol: got {shown(protocol)}, expected {expected}{pair}")
    if protocol in ("table3", "table4", "table5", "table7"):  # the paper evaluates these tables like Table 2
        protocol = "table2"
    if protocol not in PROTOCOLS:
        hint = did_you_mean(protocol, PROTOCOLS)
        raise ValueError(f"protocol: got {protocol!r}, expected one of {names}{hint}")
    return PROTOCOLS[protocol]


def require_packages(protocol: Protocol) -> None:
    """Import the packages that the attacks of the protocol need; ImportError says how to install a missing one."""
    if any(spec.name == AUTOATTACK for spec in protocol.attacks):
        pyautoattack()


def pyautoattack() -> Any:
    """Import and return `pyautoattack.AutoAttack`; ImportError says how to install it."""
    with extra("autoattack"):
        return importlib.import_module("pyautoattack").AutoAttack
