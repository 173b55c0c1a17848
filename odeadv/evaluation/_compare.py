"""Compare two evaluations on the same examples in pairs."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from odeadv.evaluation._evaluation import AttackResult, Evaluation
from odeadv.evaluation.protocols import unique_names
from odeadv.support.checks import shown
from odeadv.support.statistics import exact_p_value


@dataclass(frozen=True)
class McNemar:
    """An exact McNemar test of two models on the same examples.

    Attributes:
        n: number of examples.
        both: number of examples that both models get right.
        only_a: number b of examples that only the first model gets right.
        only_b: number c of examples that only the second model gets right.
        neither: number of examples that both models get wrong.
        p_value: two-sided p-value. Suppose that each of the b + c examples is a toss of a fair coin. The p-value is the
            probability of a split at least as uneven as b to c.
    """

    n: int
    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float

    @property
    def difference(self) -> float:
        """The accuracy of the first model minus the accuracy of the second, in [-1, 1]."""
        return (self.only_a - self.only_b) / self.n

    def to_dict(self) -> dict[str, float]:
        """Return all counts, the difference and the p-value as JSON-ready data."""
        return {**asdict(self), "difference": self.difference}


def compare(a: Evaluation, b: Evaluation) -> dict[str, McNemar]:
    """Apply `mcnemar` to every score that two evaluations with the same protocol share.

    The p-values are not corrected for the number of tests: of 20 tests of equally good models, about one gives
    p < 0.05 by chance.

    Args:
        a: the first model's evaluation.
        b: the second model's evaluation, on the same examples, with the same attacks in the same order.

    Returns:
        Tests by name: ``"clean"``, ``"ifgsm-20 at 8/255"``, ``"ifgsm-20 at 8/255, worst so far"``, ``"worst case"``.
        If a label occurs more than once, the name contains the place of the attack: ``"pgd-20 at 8/255 (attack 3)"``.

    Raises:
        TypeError, ValueError: as `mcnemar`, or if the attacks differ.
    """
    tests = {"clean": mcnemar(a, b, attack="clean")}
    if len(a.attacks) != len(b.attacks):
        raise ValueError(f"b: has {len(b.attacks)} attacks, expected the {len(a.attacks)} of a")
    names = unique_names([result.setting for result in a.attacks])
    for place, (name, one, other) in enumerate(zip(names, a.attacks, b.attacks, strict=True)):
        if one.outcomes is not None and other.outcomes is not None:
            tests[name] = mcnemar(a, b, attack=place)
        if one.worst_so_far_outcomes is not None and other.worst_so_far_outcomes is not None:
            tests[f"{name}, worst so far"] = mcnemar(a, b, attack=place, score="worst")
    if not (a.clean_pass_accuracies or b.clean_pass_accuracies):
        tests["worst case"] = mcnemar(a, b, attack="worst case")
    return tests


def mcnemar(
    a: Evaluation, b: Evaluation, *, attack: int | str = 0, score: Literal["last", "worst"] = "last"
) -> McNemar:
    """Test if two models differ in accuracy under one attack, on the same examples (McNemar 1947, exact binomial).

    Args:
        a: the first model's evaluation.
        b: the second model's evaluation, on the same images and labels in the same order.
        attack: place of the attack in the protocol, or its label (``"ifgsm-20 at 8/255"``), or ``"clean"``, or
            ``"worst case"`` for all attacks together.
        score: ``"last"`` compares outcomes of the final images of the attack, ``"worst"`` worst-so-far outcomes.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if the data differ, the attacks differ, or the score was not measured.
    """
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Evaluation):
            raise TypeError(f"{name}: got {type(value).__name__}, expected an Evaluation")
    if score not in ("last", "worst"):
        raise ValueError(f"score: got {score!r}, expected 'last' or 'worst'")
    if a.n != b.n:
        raise ValueError(f"b: has {b.n} examples, expected the {a.n} of a")
    if a.data and b.data and a.data != b.data:
        raise ValueError(
            f"b: has other data ({b.data}), expected those of a ({a.data}), because outcomes are compared in pairs"
        )
    if not (a.data and b.data):
        warnings.warn(
            "mcnemar: an evaluation lacks a digest of its data, so it is not known if both have the same images",
            RuntimeWarning,
            stacklevel=2,
        )
    first, second = (_outcomes(value, attack, score) for value in (a, b))
    if first[0] != second[0]:
        one, other = shown(first[0]), shown(second[0])
        raise ValueError(f"attack: {attack!r} is {one} in a and {other} in b, expected the same attack")
    right_a, right_b = first[1], second[1]
    only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    both = int((right_a & right_b).sum())
    return McNemar(a.n, both, only_a, only_b, a.n - both - only_a - only_b, exact_p_value(only_a, only_b))


def _outcomes(evaluation: Evaluation, attack: object, score: str) -> tuple[tuple[Any, ...], Tensor]:
    """Return the values that identify the attack, and its outcomes."""
    if attack == "clean":
        return ("clean",), evaluation.clean_outcomes
    if attack == "worst case":
        return ("worst case", *(_identity(result) for result in evaluation.attacks)), evaluation.worst_case_outcomes
    labels = [result.setting for result in evaluation.attacks]
    expected = f"expected a place, 'clean', 'worst case', or one of {', '.join(labels)}"
    if isinstance(attack, str):
        if labels.count(attack) != 1:
            raise ValueError(f"attack: got {attack!r}, {expected}")
        attack = labels.index(attack)
    if isinstance(attack, bool) or not isinstance(attack, int):
        raise TypeError(f"attack: got {attack!r}, {expected}")
    if not 0 <= attack < len(labels):
        raise ValueError(f"attack: got {attack}, expected 0 to {len(labels) - 1}")
    result = evaluation.attacks[attack]
    what = _identity(result)
    if score == "worst":
        if result.worst_so_far_outcomes is None:
            raise ValueError(f"score: got 'worst', expected 'last': worst-so-far was not measured for {labels[attack]}")
        return what, result.worst_so_far_outcomes
    if result.outcomes is None:
        raise ValueError(f"score: got 'last', expected 'worst': {labels[attack]} was scored worst-so-far only")
    return what, result.outcomes


def _identity(result: AttackResult) -> tuple[Any, ...]:
    # An evaluation from a file has lists instead of tuples, so convert both through JSON.
    return tuple(json.loads(json.dumps([result.name, result.eps, result.alpha, result.steps, dict(result.options)])))
