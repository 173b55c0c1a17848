"""What an evaluation found: outcomes of every example, accuracies, and what it cost."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from odeadv.evaluation.protocols import AttackSpec, radius_text
from odeadv.support.extras import extra

SCHEMA = "odeadv.evaluation/2"
_NORMAL_QUANTILE = 1.959963984540054  # of 0.975


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of an accuracy of ``correct`` out of ``n`` >= 1 (Wilson 1927)."""
    z2 = _NORMAL_QUANTILE**2
    centre = (correct + z2 / 2) / (n + z2)
    half = _NORMAL_QUANTILE / (n + z2) * math.sqrt(correct * (n - correct) / n + z2 / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What one attack did. Accuracies are fractions in [0, 1].

    Attributes:
        name: of the attack, e.g. ``"ifgsm"``.
        eps: radius of the ball, in pixel units of [0, 1].
        alpha: size of one step, in the same units; None where the attack has none.
        steps: number of steps; None where the attack has none.
        outcomes: (n,) bool on the CPU, true where the images that the attack ended with (for IFGSM the *last
            iterate*) are classified correctly; None if only the worst-so-far score was asked for.
        worst_so_far_outcomes: (n,) bool on the CPU, true where the clean image and *everything scored on the way*
            (for IFGSM every iterate; for an attack that returns its best image, that) are; None where only the last
            iterate was scored (``score="last"`` of PGD and of IFGSM with options).
        options: the attack's further arguments.
    """

    name: str
    eps: float
    alpha: float | None
    steps: int | None
    outcomes: Tensor | None
    worst_so_far_outcomes: Tensor | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """A short name, as `AttackSpec.label` without the score: ``ifgsm-20 at 8/255``."""
        steps = f"-{self.steps}" if self.steps is not None and self.name != "fgsm" else ""
        return f"{self.name}{steps} at {radius_text(self.eps, self.options)}"

    @property
    def robust_correct(self) -> int:
        """How many last iterates are classified correctly. ValueError if that was not scored."""
        if self.outcomes is None:
            raise ValueError(f"robust_correct: {self.label} was scored worst-so-far only, see worst_so_far_correct")
        return int(self.outcomes.sum())

    @property
    def robust_accuracy(self) -> float:
        """The fraction of last iterates that are classified correctly: the paper's figure. ValueError as above."""
        return self.robust_correct / self._n

    @property
    def worst_so_far_correct(self) -> int:
        """For how many examples the clean image and every iterate are right. ValueError if that was not scored."""
        if self.worst_so_far_outcomes is None:
            raise ValueError(f"worst_so_far_correct: {self.label} was scored by what it returned; give score='worst'")
        return int(self.worst_so_far_outcomes.sum())

    @property
    def worst_so_far_accuracy(self) -> float:
        """`worst_so_far_correct` as a fraction; never above the robust accuracy, and not comparable with it."""
        return self.worst_so_far_correct / self._n

    @property
    def _n(self) -> int:
        outcomes = self.worst_so_far_outcomes if self.outcomes is None else self.outcomes
        return 0 if outcomes is None else len(outcomes)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """The result of `evaluate`; prints as a small table. Accuracies are fractions in [0, 1].

    Attributes:
        protocol: name of the protocol.
        clean_outcomes: (n,) bool on the CPU, true where the clean image is classified correctly.
        attacks: one result for each attack of the protocol, in its order.
        forward_passes: images sent through the model by the protocol.
        gradient_evaluations: images sent back through it too.
        seconds: wall-clock time, that of interrupted runs included.
        model: digest of the model's state, ``""`` if not known.
        data: digest of images and labels, ``""`` if not known.
        settings: what the figures may depend on by rounding or by chance: batch size, seed, folding, ...
        checks: what was measured beside the protocol: forward passes of the probes, bf16 against full precision.
        notes: what a reader should know, e.g. warnings of AutoAttack, or that the model was not compiled.
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

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.clean_outcomes)

    @property
    def clean_correct(self) -> int:
        """How many clean images are classified correctly."""
        return int(self.clean_outcomes.sum())

    @property
    def clean_accuracy(self) -> float:
        """The fraction of clean images that are classified correctly."""
        return self.clean_correct / self.n

    @property
    def average(self) -> float:
        """Mean of the robust (last-iterate) accuracies: the paper's "Avg". The clean accuracy is not in it.

        ValueError if an attack was scored worst-so-far only: the two are never mixed.
        """
        return fmean(attack.robust_accuracy for attack in self.attacks)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data; ``*_interval`` are 95 % Wilson intervals [low, high].

        ``outcomes`` are base64 of packed bits, one an example (`Evaluation.from_dict` unpacks them). Where an attack
        was scored worst-so-far only, its ``robust_*`` and the ``average`` are None; where worst-so-far was not
        measured, its ``worst_so_far_*`` are.
        """
        complete = all(attack.outcomes is not None for attack in self.attacks)
        return {
            "schema": SCHEMA,
            "protocol": self.protocol,
            "n": self.n,
            **_accuracy("clean", self.clean_correct, self.n),
            "clean_outcomes": pack(self.clean_outcomes),
            "attacks": [self._attack_to_dict(attack) for attack in self.attacks],
            "average": self.average if complete else None,
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
        return {
            "name": attack.name,
            "eps": attack.eps,
            "eps_255": _in_255(attack.eps),
            "alpha": attack.alpha,
            "alpha_255": _in_255(attack.alpha),
            "steps": attack.steps,
            "options": dict(attack.options),
            **_accuracy("robust", last, self.n),
            **_accuracy("worst_so_far", worst, self.n),
            "outcomes": _packed(attack.outcomes),
            "worst_so_far_outcomes": _packed(attack.worst_so_far_outcomes),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `to_dict` made ``value`` from.

        Raises:
            ValueError: if it is of another schema (the first kept no outcomes), a key is missing or of another type,
                or the outcomes do not fit the accuracies.
        """
        if value.get("schema") != SCHEMA:
            raise ValueError(f"schema: got {value.get('schema')!r}, expected {SCHEMA!r}")
        try:
            _check_types(value)
            n = value["n"]
            result = cls(
                protocol=value["protocol"],
                clean_outcomes=unpack(value["clean_outcomes"], n),
                attacks=tuple(
                    AttackResult(
                        **{key: row[key] for key in ("name", "eps", "alpha", "steps", "options")},
                        outcomes=_unpacked(row["outcomes"], n),
                        worst_so_far_outcomes=_unpacked(row["worst_so_far_outcomes"], n),
                    )
                    for row in value["attacks"]
                ),
                **{key: value[key] for key in ("forward_passes", "gradient_evaluations", "seconds", "model", "data")},
                settings=value["settings"],
                checks=value["checks"],
                notes=tuple(value["notes"]),
            )
        except KeyError as error:
            raise ValueError(f"evaluation: no {error}, expected all that Evaluation.to_dict writes") from None
        for mine, theirs in zip(
            [result.to_dict(), *result.to_dict()["attacks"]], [value, *value["attacks"]], strict=True
        ):
            for key in mine:
                if key.endswith(("_correct", "_accuracy", "average")) and not _agree(mine[key], theirs.get(key)):
                    raise ValueError(f"{key}: got {theirs.get(key)!r}, expected {mine[key]!r} as in the outcomes")
        return result

    def __repr__(self) -> str:
        lines = [
            f"{self.protocol}: n = {self.n}, {self.forward_passes / self.n:g} forward passes and "
            f"{self.gradient_evaluations / self.n:g} gradients per image, {self.seconds:.1f} s",
            f"{'attack':<8}{'eps*255':>9}{'alpha*255':>11}{'steps':>7}{'robust %':>10}{'worst so far %':>16}",
            f"{'clean':<8}{'':27}{100 * self.clean_accuracy:>10.2f}",
        ]
        for attack in self.attacks:
            alpha = "" if attack.alpha is None else f"{_in_255(attack.alpha):g}"
            robust = "" if attack.outcomes is None else f"{100 * attack.robust_accuracy:.2f}"
            worst = "" if attack.worst_so_far_outcomes is None else f"{100 * attack.worst_so_far_accuracy:.2f}"
            lines.append(
                f"{attack.name:<8}{_in_255(attack.eps):>9g}{alpha:>11}{attack.steps or '':>7}{robust:>10}{worst:>16}"
            )
        if all(attack.outcomes is not None for attack in self.attacks):
            lines.append(f"{'average of the attacks':<35}{100 * self.average:>10.2f}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def result_of(spec: AttackSpec, outcomes: Tensor | None, worst: Tensor | None) -> AttackResult:
    """The result of one attack of a protocol."""
    options = spec.to_dict()["options"]
    return AttackResult(spec.name, spec.eps, spec.alpha, spec.steps, outcomes, worst, options)


def _accuracy(name: str, correct: int | None, n: int) -> dict[str, Any]:
    return {
        f"{name}_correct": correct,
        f"{name}_accuracy": None if correct is None else correct / n,
        f"{name}_interval": None if correct is None else list(wilson_interval(correct, n)),
    }


def _packed(outcomes: Tensor | None) -> str | None:
    return None if outcomes is None else pack(outcomes)


def _unpacked(text: object, n: int) -> Tensor | None:
    return None if text is None else unpack(text, n)


def _check_types(value: Mapping[str, Any]) -> None:
    """ValueError for a value that is of another type than `Evaluation.to_dict` writes."""
    number, integer, text = (int, float), (int,), (str,)
    kinds: dict[str, tuple[type, ...]] = {"n": integer, "seconds": number}
    kinds |= dict.fromkeys(("forward_passes", "gradient_evaluations"), integer)
    kinds |= dict.fromkeys(("protocol", "model", "data"), text)
    kinds |= {"settings": (dict,), "checks": (dict,), "attacks": (list, tuple), "notes": (list, tuple)}
    _check_kinds(value, kinds)
    if value["n"] < 1:
        raise ValueError(f"n: got {value['n']}, expected at least 1")
    absent = (type(None),)
    attack = {"name": text, "eps": number, "alpha": number + absent, "steps": integer + absent, "options": (dict,)}
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
    """Whether two figures are the same but for the last places."""
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return a == b


def _in_255(value: float | None) -> float | None:
    return None if value is None else round(255 * value, 9)  # so that 12/255 reads 12 again


def pack(outcomes: Tensor) -> str:
    """Base64 of ``outcomes``, bool of any shape in row-major order: eight to a byte, the first in the highest bit."""
    with extra("evaluate"):
        import numpy

    bits = numpy.packbits(outcomes.detach().cpu().reshape(-1).numpy())
    return base64.b64encode(bits.tobytes()).decode("ascii")


def unpack(text: object, *shape: int) -> Tensor:
    """The bool tensor of ``shape`` that `pack` made ``text`` from; ValueError if it is not one of that size."""
    with extra("evaluate"):
        import numpy

    count = 1
    for size in shape:
        count *= size
    try:
        if not isinstance(text, str):
            raise TypeError(f"got {type(text).__name__}")
        raw = numpy.frombuffer(base64.b64decode(text, validate=True), dtype=numpy.uint8)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"outcomes: {error}, expected base64 of packed bits") from None
    if len(raw) != (count + 7) // 8:
        raise ValueError(f"outcomes: got {len(raw)} bytes, expected {(count + 7) // 8} for {count} outcomes")
    return torch.from_numpy(numpy.unpackbits(raw, count=count).astype(bool)).reshape(shape)
