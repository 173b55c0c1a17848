"""The result of an evaluation: outcomes of every example, accuracies, and the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from odeadv.evaluation.protocols import AttackSpec, Radius, in_255ths, radius_text, short_name, unique_names
from odeadv.support.plain import pack, unpack
from odeadv.support.statistics import wilson_interval

SCHEMA = "odeadv.evaluation/3"
# Version 2 lacks the worst case, the scores per pass and the units of radii. The rest is the same.
READABLE = (SCHEMA, "odeadv.evaluation/2")


def standard_error(accuracies: Sequence[float]) -> float | None:
    """Return the standard error of the mean of the accuracies of passes; None for fewer than two passes."""
    return stdev(accuracies) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else None


@dataclass(frozen=True, eq=False)
class AttackResult:
    """The result of one attack. Accuracies are fractions in [0, 1].

    Attributes:
        name: name of the attack, e.g. ``"ifgsm"``, or ``"module:function"`` for an attack of your own.
        eps: radius of the ball, in pixel units of [0, 1]; a tuple if every example has its own radius.
        alpha: size of one step, in the same units, or a tuple; None for an attack without a step size.
        steps: number of steps; None for an attack without steps.
        outcomes: (n,) bool on the CPU, true if the final image of the attack (for IFGSM the *last iterate*) is
            classified correctly. None if only the worst-so-far score was requested. For a random model: true if the
            image is classified correctly in more than half of the passes.
        worst_so_far_outcomes: (n,) bool on the CPU, true if the clean image and *every scored image* are classified
            correctly. Scored images are every iterate of IFGSM, or the returned image of an attack that returns its
            best image. None if only the last iterate was scored (``score="last"`` of PGD and of IFGSM with options).
            Also None for a random model, because the worst of many draws would count noise as an attack.
        options: further arguments of the attack.
        pass_accuracies: for a random model, the accuracy in each of the fresh forward passes; otherwise empty.
    """

    name: str
    eps: Radius
    alpha: Radius | None
    steps: int | None
    outcomes: Tensor | None
    worst_so_far_outcomes: Tensor | None
    options: Mapping[str, Any] = field(default_factory=dict)
    pass_accuracies: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        """A short name, the same as `AttackSpec.label`: ``ifgsm-20 at 8/255``."""
        return f"{self.setting} (worst so far)" if self.outcomes is None else self.setting

    @property
    def setting(self) -> str:
        """The short name without the score."""
        steps = f"-{self.steps}" if self.steps is not None and self.name != "fgsm" else ""
        return f"{short_name(self.name)}{steps} at {radius_text(self.eps, self.options)}"

    @property
    def robust_correct(self) -> int:
        """The number of last iterates that are classified correctly; raises ValueError if they were not scored."""
        if self.outcomes is None:
            raise ValueError(f"robust_correct: {self.setting} was scored worst-so-far only, see worst_so_far_correct")
        return int(self.outcomes.sum())

    @property
    def robust_accuracy(self) -> float:
        """The fraction of last iterates that are classified correctly: the paper's figure.

        For a random model it is the mean over the passes. Raises ValueError as `robust_correct`.
        """
        return fmean(self.pass_accuracies) if self.pass_accuracies else self.robust_correct / self._n

    @property
    def standard_error(self) -> float | None:
        """The standard error of `robust_accuracy` over the passes of a random model; None for fewer than two passes."""
        return standard_error(self.pass_accuracies)

    @property
    def worst_so_far_correct(self) -> int:
        """The number of examples whose clean image and every iterate are classified correctly.

        Raises ValueError if the worst-so-far score was not measured.
        """
        if self.worst_so_far_outcomes is None:
            raise ValueError(f"worst_so_far_correct: {self.label} was scored by what it returned; give score='worst'")
        return int(self.worst_so_far_outcomes.sum())

    @property
    def worst_so_far_accuracy(self) -> float:
        """`worst_so_far_correct` as a fraction. It is never above `robust_accuracy`; do not compare the two."""
        return self.worst_so_far_correct / self._n

    @property
    def measured(self) -> list[Tensor]:
        """The outcomes that were measured, (n,) bool each."""
        return [row for row in (self.outcomes, self.worst_so_far_outcomes) if row is not None]

    @property
    def _n(self) -> int:
        return len(self.measured[0]) if self.measured else 0


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """The result of `evaluate`; prints as a small table. Accuracies are fractions in [0, 1].

    Attributes:
        protocol: name of the protocol.
        clean_outcomes: (n,) bool on the CPU, true if the clean image is classified correctly (for a random model: in
            more than half of the passes).
        attacks: one result per attack of the protocol, in its order.
        forward_passes: number of images that the protocol sent through the model.
        gradient_evaluations: number of those images that were also differentiated.
        seconds: wall-clock time, including the time of interrupted runs.
        model: digest of the model's state, ``""`` if unknown.
        data: digest of images and labels, ``""`` if unknown.
        settings: settings that may change the figures by rounding or by chance: batch size, seed, folding, ...
        checks: figures that do not belong to the protocol: forward passes and gradients of the probes, signs of failed
            attacks.
        notes: sentences for the reader, e.g. warnings of AutoAttack, or signs that an attack is meaningless.
        clean_pass_accuracies: for a random model, the clean accuracy in each of the passes; otherwise empty.
    """

    protocol: str
    clean_outcomes: Tensor
    attacks: tuple[AttackResult, ...]
    forward_passes: int
    gradient_evaluations: int
    seconds: float
    model: str = ""
    data: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    checks: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    clean_pass_accuracies: tuple[float, ...] = ()

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.clean_outcomes)

    @property
    def clean_correct(self) -> int:
        """The number of clean images that are classified correctly."""
        return int(self.clean_outcomes.sum())

    @property
    def clean_accuracy(self) -> float:
        """The fraction of clean images that are classified correctly; for a random model, the mean over passes."""
        return fmean(self.clean_pass_accuracies) if self.clean_pass_accuracies else self.clean_correct / self.n

    @property
    def average(self) -> float:
        """The mean of the robust (last-iterate) accuracies: the paper's "Avg". It excludes the clean accuracy.

        Raises ValueError if an attack was scored worst-so-far only, because the two scores are never mixed.
        """
        return fmean(attack.robust_accuracy for attack in self.attacks)

    @property
    def worst_case_outcomes(self) -> Tensor:
        """(n,) bool on the CPU, true if the clean image is classified correctly, and also under every attack.

        Raises ValueError for a random model, because the worst of many draws would count noise as an attack.
        """
        if self.clean_pass_accuracies:
            raise ValueError(
                "worst_case: the model is random, and the worst of many draws counts noise as an attack; "
                "evaluate odeadv.models.averaged(model, passes=...)"
            )
        rows = [self.clean_outcomes, *(row for attack in self.attacks for row in attack.measured)]
        return torch.stack(rows).all(dim=0)

    @property
    def worst_case_correct(self) -> int:
        """The number of examples that are correct under every attack; raises ValueError as `worst_case_outcomes`."""
        return int(self.worst_case_outcomes.sum())

    @property
    def worst_case(self) -> float:
        """The accuracy to quote: an example counts only if it is correct under every attack of the protocol.

        Raises ValueError as `worst_case_outcomes`.
        """
        return self.worst_case_correct / self.n

    @property
    def worst_case_interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of `worst_case`."""
        return wilson_interval(self.worst_case_correct, self.n)

    @property
    def names(self) -> tuple[str, ...]:
        """A different name for each attack: its label, with its place if several attacks share the label."""
        return unique_names([attack.label for attack in self.attacks])

    def to_dict(self) -> dict[str, Any]:
        """Return the whole evaluation as JSON-ready data; ``*_interval`` are 95 % Wilson intervals [low, high].

        ``outcomes`` are packed bits, one per example, in base64 (`Evaluation.from_dict` unpacks them). Figures that
        were not measured are None: ``robust_*`` if an attack was scored worst-so-far only, and then also ``average``;
        ``worst_so_far_*`` if only the last iterate was scored; ``worst_case_*`` of a random model.
        """
        complete = all(attack.outcomes is not None for attack in self.attacks)
        random = bool(self.clean_pass_accuracies)
        return {
            "schema": SCHEMA,
            "protocol": self.protocol,
            "n": self.n,
            **_accuracy("clean", self.clean_correct, self.n, self.clean_pass_accuracies),
            "clean_outcomes": pack(self.clean_outcomes),
            "attacks": [self._attack_to_dict(attack) for attack in self.attacks],
            "average": self.average if complete else None,
            **_accuracy("worst_case", None if random else self.worst_case_correct, self.n),
            "forward_passes": self.forward_passes,
            "gradient_evaluations": self.gradient_evaluations,
            "seconds": self.seconds,
            "model": self.model,
            "data": self.data,
            "settings": dict(self.settings),
            "checks": dict(self.checks),
            "notes": list(self.notes),
        }

    def _attack_to_dict(self, attack: AttackResult) -> dict[str, Any]:
        last = None if attack.outcomes is None else attack.robust_correct
        worst = None if attack.worst_so_far_outcomes is None else attack.worst_so_far_correct
        unit = in_255ths(attack.options)
        return {
            "name": attack.name,
            "radius": radius_text(attack.eps, attack.options),
            "eps": _plain(attack.eps),
            "eps_255": _in_255(attack.eps) if unit else None,
            "alpha": _plain(attack.alpha),
            "alpha_255": _in_255(attack.alpha) if unit else None,
            "steps": attack.steps,
            "options": dict(attack.options),
            **_accuracy("robust", last, self.n, attack.pass_accuracies),
            **_accuracy("worst_so_far", worst, self.n),
            "outcomes": _packed(attack.outcomes),
            "worst_so_far_outcomes": _packed(attack.worst_so_far_outcomes),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation that `to_dict` converted to ``value``, in this version or version 2 of the schema.

        Raises:
            ValueError: if ``value`` has another schema (version 1 kept no outcomes), a key is missing or has another
                type, or the outcomes do not fit the accuracies.
        """
        if value.get("schema") not in READABLE:
            raise ValueError(f"schema: got {value.get('schema')!r}, expected {' or '.join(map(repr, READABLE))}")
        try:
            _check_types(value)
            n = value["n"]
            result = cls(
                protocol=value["protocol"],
                clean_outcomes=unpack(value["clean_outcomes"], n),
                attacks=tuple(
                    AttackResult(
                        row["name"],
                        _radius(row["eps"]),
                        _radius(row["alpha"]),
                        row["steps"],
                        outcomes=_unpacked(row["outcomes"], n),
                        worst_so_far_outcomes=_unpacked(row["worst_so_far_outcomes"], n),
                        options=row["options"],
                        pass_accuracies=tuple(row.get("robust_pass_accuracies", ())),
                    )
                    for row in value["attacks"]
                ),
                **{key: value[key] for key in ("forward_passes", "gradient_evaluations", "seconds", "model", "data")},
                settings=value["settings"],
                checks=value["checks"],
                notes=tuple(value["notes"]),
                clean_pass_accuracies=tuple(value.get("clean_pass_accuracies", ())),
            )
        except KeyError as error:
            raise ValueError(f"evaluation: no {error}, expected all that Evaluation.to_dict writes") from None
        own = result.to_dict()
        for mine, theirs in zip([own, *own["attacks"]], [value, *value["attacks"]], strict=True):
            for key in theirs:
                checked = key in mine and key.endswith(("_correct", "_accuracy", "average"))
                if checked and not _agree(mine[key], theirs[key]):
                    raise ValueError(f"{key}: got {theirs[key]!r}, expected {mine[key]!r} as in the outcomes")
        return result

    def __repr__(self) -> str:
        lines = [
            f"{self.protocol}: n = {self.n}, {self.forward_passes / self.n:g} forward passes and "
            f"{self.gradient_evaluations / self.n:g} gradients per image, {self.seconds:.1f} s"
        ]
        radii = [radius_text(attack.eps, attack.options) for attack in self.attacks]
        steps = ["" if attack.alpha is None else radius_text(attack.alpha, attack.options) for attack in self.attacks]
        wide, long = (max(12, 2 + max(map(len, texts), default=0)) for texts in (radii, steps))
        names = [short_name(attack.name) for attack in self.attacks]
        first = max(10, 2 + max(map(len, names), default=0))
        lines.append(
            f"{'attack':<{first}}{'radius':>{wide}}{'step size':>{long}}{'steps':>7}"
            f"{'robust %':>10}{'worst so far %':>16}"
        )
        left = first + 7 + wide + long
        clean_error = _error(standard_error(self.clean_pass_accuracies))
        lines.append(f"{'clean':<{left}}{100 * self.clean_accuracy:>10.2f}{clean_error}")
        for attack, name, eps, alpha in zip(self.attacks, names, radii, steps, strict=True):
            robust = "" if attack.outcomes is None else f"{100 * attack.robust_accuracy:.2f}"
            worst = "" if attack.worst_so_far_outcomes is None else f"{100 * attack.worst_so_far_accuracy:.2f}"
            lines.append(
                f"{name:<{first}}{eps:>{wide}}{alpha:>{long}}{attack.steps or '':>7}"
                f"{robust:>10}{worst or _error(attack.standard_error):>16}".rstrip()
            )
        if all(attack.outcomes is not None for attack in self.attacks):
            lines.append(f"{'average of the attacks':<{left}}{100 * self.average:>10.2f}")
        if not self.clean_pass_accuracies:
            low, high = (100 * bound for bound in self.worst_case_interval)
            label, figure = "right under every attack (worst case)", f"{100 * self.worst_case:>10.2f}"
            lines.append(f"{label:<{left}}{figure}  [{low:.2f}, {high:.2f}]")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def result_of(spec: AttackSpec, last: Tensor | None, worst: Tensor | None, *, random: bool) -> AttackResult:
    """Return the result of one attack.

    Args:
        spec: the attack.
        last: (passes, n) bool, last-iterate outcomes, or None.
        worst: (n,) bool, worst-so-far outcomes, or None.
        random: True if the model is random.
    """
    options = spec.to_dict()["options"]
    passes = by_pass(last) if random and last is not None else ()
    outcomes = None if last is None else majority(last)
    return AttackResult(spec.full_name, spec.eps, spec.alpha, spec.steps, outcomes, worst, options, passes)


def by_pass(outcomes: Tensor) -> tuple[float, ...]:
    """Return the accuracy of each pass, for outcomes (passes, n)."""
    return tuple(outcomes.double().mean(dim=1).tolist())


def majority(outcomes: Tensor) -> Tensor:
    """Return (n,) bool for outcomes (passes, n): True if more than half of the passes are correct."""
    return outcomes.double().mean(dim=0) > 0.5


def _accuracy(name: str, correct: int | None, n: int, passes: tuple[float, ...] = ()) -> dict[str, Any]:
    figures: dict[str, Any] = {
        f"{name}_correct": correct,
        f"{name}_accuracy": None if correct is None else fmean(passes) if passes else correct / n,
        f"{name}_interval": None if correct is None else list(wilson_interval(correct, n)),
    }
    if passes:
        figures |= {f"{name}_pass_accuracies": list(passes), f"{name}_standard_error": standard_error(passes)}
    return figures


def _error(value: float | None) -> str:
    return "" if value is None else f" +- {100 * value:.2f}"


def _packed(outcomes: Tensor | None) -> str | None:
    return None if outcomes is None else pack(outcomes)


def _unpacked(text: object, n: int) -> Tensor | None:
    return None if text is None else unpack(text, n)


def _check_types(value: Mapping[str, Any]) -> None:
    """Raise ValueError if the type of a value differs from the type that `Evaluation.to_dict` writes."""
    number, integer, text = (int, float), (int,), (str,)
    kinds: dict[str, tuple[type, ...]] = {"n": integer, "seconds": number}
    kinds |= dict.fromkeys(("forward_passes", "gradient_evaluations"), integer)
    kinds |= dict.fromkeys(("protocol", "model", "data"), text)
    kinds |= {"settings": (dict,), "checks": (dict,), "attacks": (list, tuple), "notes": (list, tuple)}
    _check_kinds(value, kinds)
    if value["n"] < 1:
        raise ValueError(f"n: got {value['n']}, expected at least 1")
    absent = (type(None),)
    lengths = (*number, list, tuple)
    attack = {"name": text, "eps": lengths, "alpha": lengths + absent, "steps": integer + absent, "options": (dict,)}
    for row in value["attacks"]:
        if not isinstance(row, Mapping):
            raise ValueError(f"attacks: got {type(row).__name__}, expected a mapping for each")
        _check_kinds(row, attack)


def _check_kinds(value: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> None:
    for key, kind in kinds.items():
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            names = " or ".join(item.__name__ for item in kind)
            raise ValueError(f"{key}: got {value[key]!r}, expected {names}")


def _agree(a: object, b: object) -> bool:
    """Return True if two figures are equal up to rounding."""
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return a == b


def _in_255(value: Radius | None) -> float | list[float] | None:
    if isinstance(value, tuple):
        return [round(255 * each, 9) for each in value]
    return None if value is None else round(255 * value, 9)  # rounding turns 11.999999... back into 12


def _radius(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Radius | None) -> float | list[float] | None:
    return list(value) if isinstance(value, tuple) else value
