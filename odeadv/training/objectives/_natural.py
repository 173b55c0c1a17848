"""Training on the images as they are."""

from __future__ import annotations

from dataclasses import dataclass

from odeadv.training._step import Objective, Passed, Step


@dataclass(frozen=True)
class Natural(Objective, name="natural"):
    """L(f(x), y); with a defence L_LAD(f(x), y)."""

    def __call__(self, step: Step) -> Passed:
        """The defended pass of the clean images."""
        return step.defended(step.images)
