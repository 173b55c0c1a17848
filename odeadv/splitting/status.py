"""How a solve ended."""

from __future__ import annotations

from enum import Enum


class Outcome(Enum):
    """How a search for steps ended."""

    DONE = "done"
    TOO_SMALL = "too small"
    TOO_MANY = "too many"


class Status(Enum):
    """How a solve ended; ``status.message`` says it in words."""

    SUCCESS = "the solve reached the end of its span"
    NON_FINITE = "a state or the loss is NaN or infinite"
    NOT_CONVERGED = "the sweeps over the costate did not converge"
    STEP_TOO_SMALL = "the tolerances would need steps below the smallest one, so the solve ends early"
    TOO_MANY_STEPS = "the tolerances would need more steps than allowed, so the solve ends early"
    UNKNOWN = "inside a torch.func transform states cannot be looked at, so nothing is known of their values"

    @property
    def message(self) -> str:
        """The status in words."""
        return self.value
