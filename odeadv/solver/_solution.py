"""The result of a solve (`Solution`), its cost (`Stats`) and its failure (`SolveError`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from odeadv.costate import Costate
from odeadv.solver._plot import draw
from odeadv.solver._trees import mapped, named_tensors
from odeadv.splitting.status import Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Stats:
    """The cost of a solve.

    Attributes:
        steps: number of steps of the final solve.
        recordings: number of recording passes before the final solve.
        evaluations: number of evaluations of each operator (right-hand side, flow or jump), including recordings.
        vjps: number of vector-Jacobian products of f. They come from back-propagation through its evaluations, from
            values of the costate between nodes, and from the Jacobians of implicit sub-steps.
        jvps: number of Jacobian-vector products of f, in implicit sub-steps that solve by GMRES. A product with a
            linearised sweep (``Converge(method="newton")``) counts as many times as the sweep has evaluations and
            products.
        solves: number of equations of implicit stages.
        iterations: number of Newton iterations for these equations; 0 if the operator has a direct solver.
        states_held: largest number of tensors of the size of the state that are in memory at the same time. They are
            states and costates at the nodes of recordings, and saved states. Tensors that autograd keeps within a step
            are not counted.
        rejected: with adaptive steps, number of trial steps that did not meet the tolerances.
        residuals: with ``sweeps="converge"``, the relative change of each sweep, including sweeps on coarse grids; with
            ``costate="collocation"``, of each Newton step.
    """

    steps: int = 0
    recordings: int = 0
    evaluations: dict[str, int] = field(default_factory=dict)
    vjps: int = 0
    jvps: int = 0
    solves: int = 0
    iterations: int = 0
    states_held: int = 0
    rejected: int = 0
    residuals: list[float] = field(default_factory=list)


HINTS = {
    Status.NON_FINITE: "take more steps or a smaller eta; throw=False returns the solution as it is",
    Status.NEWTON_FAILED: "take more steps, another sub-step, or more iterations (odeadv.Operator(f, "
    "solve=odeadv.Newton(most=...))); throw=False returns the solution as it is",
    Status.NOT_CONVERGED: "plain sweeps diverge if eta * I is 1 or more, and at 1 a solution does not exist: take "
    "another eta, more steps, or more memory for the acceleration (odeadv.Converge(memory=20)); throw=False returns "
    "the last iterate",
    Status.STEP_TOO_SMALL: "loosen rtol or atol, or look for a singularity there; throw=False returns the part solved",
    Status.TOO_MANY_STEPS: "loosen rtol or atol, or allow more (odeadv.Adaptive(most=...)); throw=False returns the "
    "part solved",
}


class SolveError(RuntimeError):
    """Raised if a solve does not succeed.

    Args:
        solution: what there is of the solution.
        remedy: what to try, for the message; by default the usual remedy for the status of ``solution``.

    Attributes:
        solution: the solution up to the failure.
    """

    def __init__(self, solution: Solution, remedy: str | None = None) -> None:
        stats = solution.stats
        cost = f"scheme {solution.scheme!r}, {stats.steps} steps to t = {solution.ts[-1].item():g}"
        if stats.residuals:
            first, last = stats.residuals[0], stats.residuals[-1]
            cost += f", residuals {first:.2g} to {last:.2g} in {len(stats.residuals)} iterations"
        super().__init__(f"solve: {solution.status.message} ({cost}); {remedy or HINTS[solution.status]}")
        self.solution, self._remedy = solution, remedy

    def __reduce__(self) -> tuple[type[SolveError], tuple[Solution, str | None]]:
        return SolveError, (self.solution, self._remedy)


class Solution:
    """The saved states of a solve, with its costate, output, loss and cost.

    A solution can be pickled and copied. Copies do not contain autograd graphs and do not contain the costate, because
    the costate contains the field.

    Attributes:
        ts: the saved times, float64, shape ``(K,)``.
        xs: the saved states: one tensor ``(K, *state)``, or a tuple of K tensors if the state changes its shape. If the
            initial state was a tuple, list, dict or named tuple of tensors, ``xs`` has the same structure, with tensors
            of shape ``(K, *shape)``.
        status: the outcome, a `Status`.
        stats: the cost, a `Stats`.
        scheme: name of the scheme.
        order: the expected order, which is the lowest order of scheme, sub-steps and costate; infinite for exact flows.
        output: for an `AdversarialField`, the read-out of the final state (logits of a network); otherwise None.
        loss: for an `AdversarialField`, the total loss, a scalar in the autograd graph; otherwise None. It is the loss
            of the output, plus the running cost and the losses at given times if the field has them.

    Args:
        costate: the recorded costate; None if the solve did not record one.
        record: records the costate when it is first asked for; None if the field lacks a loss.
        dense: returns the state at any time, for `__call__`; None if the steps were not kept.
    """

    def __init__(
        self,
        ts: Tensor,
        xs: Any,
        *,
        status: Status,
        stats: Stats,
        scheme: str,
        order: float,
        output: Tensor | None = None,
        loss: Tensor | None = None,
        costate: Costate | None = None,
        record: Callable[[], Costate | None] | None = None,
        dense: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.ts = ts
        self.xs = xs
        self.status = status
        self.stats = stats
        self.scheme = scheme
        self.order = order
        self.output = output
        self.loss = loss
        self._costate = costate
        self._record = record
        self._dense = dense
        self._copied = False
        self._structured = False  # True if the state is a structure of tensors

    def __getstate__(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("ts", "xs", "output", "loss")}
        kept: dict[str, Any] = {
            k: None if value is None else mapped(Tensor.detach, value) for k, value in values.items()
        }
        kept |= {"status": self.status, "stats": self.stats, "scheme": self.scheme, "order": self.order}
        kept |= {"_costate": None, "_record": None, "_dense": None, "_copied": True, "_structured": self._structured}
        return kept

    def __call__(self, t: float | Sequence[float] | Tensor) -> Tensor:
        """Return the state at any time of the span, to the order of the method. It needs ``solve(..., dense=True)``.

        Within a step the state is interpolated, as for ``save_at``, by a cubic Hermite polynomial. The polynomial needs
        two evaluations of the field per step. If the order is above four, or a sub-step is not an explicit Runge-Kutta
        method, the step is repeated up to ``t`` instead. The result is differentiable with respect to the parameters,
        ``x0`` and ``t``.

        Args:
            t: times in any order, a float, a sequence or a tensor of any shape.

        Returns:
            The states, of shape ``(*t.shape, *state)``.

        Raises:
            ValueError: if the steps were not kept, or ``t`` is outside the span or within a jump, or the weights of the
                field have changed since the solve.
            TypeError: if ``t`` is not real.

        Example:
            >>> sol = odeadv.solve(lambda t, x: -x, torch.ones(3), (0.0, 1.0), substep="rk4", steps=10, dense=True)
            >>> sol(0.25), sol(torch.linspace(0, 1, 101)).shape
            (tensor([0.7788, 0.7788, 0.7788]), torch.Size([101, 3]))
        """
        if self._dense is None:
            kept = "copies and files of a solution do not keep its steps" if self._copied else "the steps were not kept"
            raise ValueError(f"t: {kept}; call the result of solve(..., dense=True)")
        return self._dense(t)

    @property
    def costate(self) -> Costate:
        """The recorded costate a(t) = dL/dx(t). Call it with a time, or give it to ``field.driven_by``.

        With eta = 0 the solve does not record a costate. The recording is then made on the first access, with the
        current weights.

        Raises:
            AttributeError: if the field has neither loss nor costate, or if the first recording failed.
        """
        if self._costate is None:
            if self._record is None and self._copied:
                raise AttributeError(
                    "costate: not kept in copies and files of a solution; keep sol.costate.nodes and "
                    "sol.costate.grid.times together with it"
                )
            if self._record is None:
                raise AttributeError("costate: the field lacks a loss; solve an odeadv.AdversarialField to get one")
            self._costate = self._record()
        if self._costate is None:
            raise AttributeError(f"costate: not recorded, since {self.status.message}")
        return self._costate

    def plot(self, most: int = 8) -> Figure:
        """Draw the saved states over time, and below them the costate at the same times.

        ``save_at="steps"`` in the call of `odeadv.solve` saves all states. By default only the two ends are saved, and
        the curves between them are straight lines.

        A state with few components is drawn as curves. If the last axis has more than ``most`` points, the state is
        drawn as an image over time and points. A state with two axes in space is drawn as images at up to four of the
        saved times. Of all other axes the first entry is drawn, and of complex states the real part.

        Args:
            most: largest number of curves. They show the first components of the flattened state.

        Returns:
            A `matplotlib.figure.Figure` that pyplot does not show. ``figure.savefig("solution.png")`` writes it.

        Raises:
            ValueError: if the state changes its shape, as the state of a network does.
        """
        if not isinstance(self.xs, Tensor) and not self._structured:
            raise ValueError("plot: the state changes its shape, so its components cannot be followed")
        times = self.ts.tolist()
        rows = list(named_tensors(self.xs, "x"))
        if self._costate is not None:
            found = [dict(named_tensors(self._costate(t), "dL/dx")) for t in times]
            rows += [(label, torch.stack([values[label] for values in found])) for label in found[0]]
        rows = [(f"Re {label}", x.real) if x.is_complex() else (label, x) for label, x in rows]
        real = [(label, x.detach().to(torch.float64).cpu()) for label, x in rows]
        return draw(times, real, most, f"{self.scheme}, {self.stats.steps} steps")

    def __repr__(self) -> str:
        whole = isinstance(self.xs, Tensor) or self._structured
        shape = mapped(lambda x: tuple(x.shape), self.xs) if whole else f"{len(self.xs)} tensors"
        cost = ", ".join(f"{name} {count}" for name, count in self.stats.evaluations.items())
        loss = "" if self.loss is None or self.status is Status.UNKNOWN else f", loss={self.loss.item():.6g}"
        return (
            f"Solution({self.scheme}, order {self.order:g}: t {self.ts[0].item():g} to {self.ts[-1].item():g}, "
            f"{self.stats.steps} steps, "
            f"xs {shape}{loss}, evaluations: {cost}, vjps {self.stats.vjps}, {self.status.name})"
        )
