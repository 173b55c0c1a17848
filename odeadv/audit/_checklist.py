"""The form of a check: a function with a name and a sentence that explains a failure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from odeadv.audit._report import Check
from odeadv.audit._subject import Subject


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        passed: True or False; None if the check does not apply.
        found: one sentence with the figures, or the reason why the check does not apply.
        figures: the figures behind the verdict, JSON-ready. ``"allowed"``, a number of examples, is shown too.
    """

    passed: bool | None
    found: str
    figures: Mapping[str, Any] = field(default_factory=dict)


def not_applicable(why: str) -> Finding:
    """Return the finding of a check that does not apply."""
    return Finding(None, why)


def check(
    name: str, meaning: str, *, attacks: bool = True, repeatable: bool = False
) -> Callable[[Callable[[Subject], Finding]], Callable[[Subject], Check]]:
    """Turn a function that returns a finding for a subject into a check, which never raises.

    Args:
        name: name of the line.
        meaning: one sentence that explains what a failure means.
        attacks: True if the check attacks the model. Such a check does not apply if the model cannot be attacked.
        repeatable: True if the check compares outcomes of single examples. Such a check does not apply to a random
            model, because noise alone changes these outcomes.
    """

    def decorate(function: Callable[[Subject], Finding]) -> Callable[[Subject], Check]:
        @functools.wraps(function)
        def run(subject: Subject) -> Check:
            finding = _found(function, subject, attacks, repeatable)
            status = "not applicable" if finding.passed is None else "pass" if finding.passed else "fail"
            allowed = finding.figures.get("allowed")
            text = finding.found if allowed is None else f"{finding.found} (up to {allowed} allowed)"
            return Check(name, status, finding.figures, text, meaning)  # type: ignore[arg-type]

        run.__name__ = name
        return run

    return decorate


def _found(function: Callable[[Subject], Finding], subject: Subject, attacks: bool, repeatable: bool) -> Finding:
    if attacks and not subject.attackable:
        return not_applicable("the model cannot be attacked")
    if not attacks and subject.unusable:
        return not_applicable(subject.unusable)
    if repeatable and subject.random:
        return not_applicable("the model is random, so noise alone changes outcomes; audit an average of its passes")
    try:
        return function(subject)
    except Exception as error:  # a user's model may raise any error
        return Finding(False, f"could not be checked: {type(error).__name__}: {error}")
