"""The possible outcomes of a solve."""

from __future__ import annotations

from enum import Enum


class Status(Enum):
    """The outcome of a solve. ``status.message`` describes it in a sentence."""

    SUCCESS = "the solve reached the end of its span"
    NON_FINITE = "a state or the loss is NaN or infinite"
    NEWTON_FAILED = "Newton's iteration failed in an implicit sub-step, and the state is NaN from there on"
    NOT_CONVERGED = "the iteration for the costate did not converge"
    STEP_TOO_SMALL = "the tolerances would need steps below the smallest one, so the solve ends early"
    TOO_MANY_STEPS = "the tolerances would need more steps than allowed, so the solve ends early"
    UNKNOWN = "values of states are not read, in a torch.func transform or during training, so the outcome is not known"

    @property
    def message(self) -> str:
        """The status as a sentence."""
        return self.value
