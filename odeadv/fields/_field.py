"""Vector fields: sums of named operators, with or without a problem (initial state, time span, steps)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from odeadv.fields._signature import check_arguments
from odeadv.fields._span import MovingSpan
from odeadv.fields.operator import Operator, VectorFunction, as_time
from odeadv.fields.terms import Forcing, Sum, Unrecorded
from odeadv.support.checks import number
from odeadv.support.discovery import modules_of
from odeadv.support.isolation import check_unmodified, is_wrapped, version

Field = TypeVar("Field", bound="VectorField")
#: A loss of a state: a function from a tensor to a scalar tensor.
Loss = Callable[[Tensor], Tensor]
NodeTransform = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Problem:
    """The problem that a field contains. Give the values that are None to `odeadv.solve`.

    Attributes:
        x0: the initial state, or a function without arguments that computes it for each solve.
        t_span: start and end time.
        dt: step size. Give either ``dt`` or ``steps``.
        steps: number of steps.
    """

    x0: Tensor | Callable[[], Tensor] | None = None
    t_span: tuple[float, float] | None = None
    dt: float | None = None
    steps: int | None = None


class VectorField:
    """A sum of named operators, dx/dt = sum_p f_p(t, x). Call it as ``field(t, x)``, as torchdiffeq expects.

    Args:
        operators: a dict of name to operator f_p (or callable ``f(t, x)``). Schemes number operators in this order.
        problem: the initial state, time span and steps, if the field contains them.
    """

    def __init__(self, operators: Mapping[str, Operator | VectorFunction], problem: Problem | None = None) -> None:
        self.operators: dict[str, Operator] = {
            name: operator if isinstance(operator, Operator) else _named_operator(name, operator)
            for name, operator in operators.items()
        }
        self.problem = problem or Problem()

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that an evaluation of the field runs."""
        return modules_of(*self.operators.values())

    @property
    def jumps(self) -> list[tuple[float, float]]:
        """The time intervals on which a `Jump` maps the state."""
        return [jump for operator in self.operators.values() for jump in operator.jumps]

    @property
    def edges(self) -> list[float]:
        """The times at which a step must end."""
        return [edge for operator in self.operators.values() for edge in operator.edges]

    @property
    def constant(self) -> bool:
        """True if all operators are the same on every step."""
        return all(operator.constant for operator in self.operators.values())

    def with_time_dtype(self: Field, dtype: torch.dtype) -> Field:
        """Return the same field with functions that receive times of ``dtype``."""
        return self._mapped(lambda operator: operator.with_time_dtype(dtype))

    def widened(self: Field, narrow: torch.dtype) -> Field:
        """Return the same field for float32 states. Its functions receive each state rounded to ``narrow``."""
        return self._mapped(lambda operator: operator.widened(narrow))

    def timed(self: Field, span: MovingSpan) -> Field:
        """Return the same field with the time and the rate of ``span``, see `MovingSpan`."""
        return self._mapped(lambda operator: operator.timed(span))

    def _mapped(self: Field, change: Callable[[Operator], Operator]) -> Field:
        field = copy.copy(self)
        field.operators = {name: change(operator) for name, operator in self.operators.items()}
        return field

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the right-hand side, the sum of all operators.

        Args:
            t: the time, a 0-d tensor.
            x: the state.

        Returns:
            A tensor of the shape of ``x``.
        """
        values = [operator(t, x) for operator in self.operators.values()]
        return sum(values[1:], start=values[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.operators)})"


class SplitField(VectorField):
    """A field given as a sum of named operators, dx/dt = sum_p f_p(t, x), for operator splitting.

    The order of the names is the order of the operators in a scheme. Lie-Trotter applies the operators in this order.
    Strang applies the first operator for the full step. It applies the other operators for half a step before and after
    it, the last operator outermost (the paper's Eq. 20 with F as the first operator).

    Args:
        unnamed: nothing; operators without a name raise a TypeError that says so.
        x0, t_span, dt, steps: the problem, if the field contains it. Operators cannot have these names.
        operators: at least two callables ``f(t, x)`` or `Operator` objects, by name.

    Raises:
        ValueError: if there are fewer than two operators.
        TypeError: if an operator lacks a name.

    Example:
        >>> field = odeadv.SplitField(decay=lambda t, x: -x, growth=lambda t, x: x - x**3)
        >>> odeadv.solve(field, torch.ones(2), (0.0, 1.0), scheme="strang", steps=20).xs[-1]
        tensor([0.5774, 0.5774])
    """

    def __init__(
        self,
        *unnamed: object,
        x0: Tensor | Callable[[], Tensor] | None = None,
        t_span: tuple[float, float] | None = None,
        dt: float | None = None,
        steps: int | None = None,
        **operators: Operator | VectorFunction,
    ) -> None:
        if unnamed:
            raise TypeError(
                f"operators: got {len(unnamed)} without a name, expected names: SplitField(diffusion=f, reaction=g)"
            )
        if len(operators) < 2:
            raise ValueError(
                f"operators: got {len(operators)} ({', '.join(operators) or 'none'}), expected at least two; a field "
                "with one operator is solved by passing the callable itself"
            )
        super().__init__(operators, Problem(x0, t_span, dt, steps))


class AdversarialField(VectorField):
    """The paper's Eq. 7, dx/dt = f(t, x) + eta * dL/dx(t): the costate pushes the state towards a higher loss.

    dL/dx(t) is the costate a(t) of Eq. 9 with a(T) = grad L(x(T)), for the loss L and the final time T. It depends on
    the whole trajectory, so `odeadv.solve` records it before it solves (see its arguments ``sweeps``, ``ascent`` and
    ``costate``). The right-hand side is therefore not a function of (t, x), and ``field(t, x)`` raises TypeError.
    `odeadv.driven` makes a plain field for other solvers. The operators are named ``"f"`` and ``"costate"``.

    Args:
        f: ``f(t, x)``, an `Operator`, or another field. The operators of another field are added up.
        loss: ``loss(output)`` returns a scalar tensor. Its argument is the final state, or ``readout`` of the final
            state. Give None if the total loss consists of ``running`` or ``at`` only.
        eta: factor of the costate, any finite number, or a tensor. A 0-d tensor may require a gradient, so that eta is
            learned. The axes of any other tensor are the leading axes of the state. Shape ``(batch,)`` is one eta per
            sample. Shape ``(1, d)`` is one eta per component of a state of shape ``(batch, d)``. A positive eta raises
            the loss if time runs forward. It lowers the loss if time runs backward, because the right-hand side is then
            subtracted. The gradient of ``loss`` is multiplied by eta without normalisation. If the loss is a mean over
            a batch, keep eta / batch_size constant.
        readout: map from the final state to the output (the logits of a network); by default the identity.
        running: ``running(t, x)`` returns a scalar tensor, a cost per unit of time. Its integral over the span is added
            to the loss, and the costate equation gets a source term, da/dt = -(df/dx)^T a - d(running)/dx. The integral
            is computed by the trapezoidal rule, or by Simpson's rule if the sub-step of f has an order above two.
        at: a dict of time to ``loss(x)``. Each is a loss of the state at this time, and is added to ``loss``. The
            costate jumps at this time by the gradient of the added loss. Each time must be the end of a step.
        x0, t_span, dt, steps: the problem, if the field contains it.
        modules: modules that ``f``, ``readout`` or a loss runs, if a search does not find them, see `Operator`.

    Attributes:
        transforms: the functions given to `transformed`. They are applied in this order to each recorded costate.

    Raises:
        TypeError: if ``f``, a loss, ``running`` or ``readout`` is not callable, or ``eta`` is not a number or a real
            tensor.
        ValueError: if ``eta`` is not finite.

    Example:
        >>> field = odeadv.AdversarialField(lambda t, x: -x, lambda x: (x**2).sum(), eta=0.1)
        >>> odeadv.solve(field, torch.ones(3), (0.0, 1.0), scheme="strang", dt=0.1).xs[-1]
        tensor([0.3771, 0.3771, 0.3771])
    """

    def __init__(
        self,
        f: Operator | VectorFunction,
        loss: Loss | None,
        eta: float | Tensor,
        *,
        readout: Callable[[Tensor], Tensor] | None = None,
        running: VectorFunction | None = None,
        at: Mapping[float, Loss] | None = None,
        x0: Tensor | Callable[[], Tensor] | None = None,
        t_span: tuple[float, float] | None = None,
        dt: float | None = None,
        steps: int | None = None,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        if not callable(loss) and not (loss is None and (running or at)):
            raise TypeError(f"loss: got {type(loss).__name__}, expected a callable loss(x) returning a scalar tensor")
        for name, given in (("readout", readout), ("running", running)):
            if given is not None and not callable(given):
                raise TypeError(f"{name}: got {type(given).__name__}, expected a callable or None")
        if running is not None:
            check_arguments("running", running, "running(t, x)")
        self.eta = _read_eta(eta)
        self._rate: float | Tensor = 1.0
        self.loss: Loss = _nothing if loss is None else loss
        self.readout = readout
        self.running = running
        self.at = _timed_losses(at)
        self.transforms: tuple[NodeTransform, ...] = ()
        self._runs: tuple[object, ...] = (loss, readout, running, *self.at.values(), *modules)
        operator = (
            f if isinstance(f, Operator) else _whole(f) if isinstance(f, VectorField) else _named_operator("f", f)
        )
        super().__init__({"f": operator, "costate": Unrecorded()}, Problem(x0, t_span, dt, steps))

    @property
    def f(self) -> Operator:
        """The operator f, without the costate."""
        return self.operators["f"]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that an evaluation of the field, its read-out or its losses runs."""
        return modules_of(self.f, *self._runs)

    @property
    def idle(self) -> bool:
        """True if eta is the number 0, so that the costate does not act. False if eta is a tensor with the value 0."""
        return not isinstance(self.eta, Tensor) and self.eta == 0.0

    @property
    def accumulates(self) -> bool:
        """True if the total loss has a running cost or losses at given times."""
        return self.running is not None or bool(self.at)

    def transformed(self, transform: NodeTransform) -> AdversarialField:
        """Return the same field with ``transform`` applied to each recorded costate before it drives the state.

        Use it for ablations: noise of the same norm, gradients shuffled across the batch, the first node only. With
        several recordings (``sweeps``, ``ascent``) each recording is transformed once. ``sol.costate`` is the
        transformed costate. A second transform acts on the result of the first transform.

        Args:
            transform: ``transform(nodes)`` maps the N + 1 recorded costates a(t_n) of N steps to N + 1 tensors of the
                same shapes, dtypes and devices. The shape of a(t_n) is that of the state at t_n. ``transform`` runs
                without gradients, unless the costate is differentiated. The global random state is restored afterwards,
                so draw random numbers from a separate generator.

        Raises:
            TypeError: if ``transform`` is not callable.
            ValueError: if the field has losses at given times, because its costate jumps at these times.
        """
        if not callable(transform):
            raise TypeError(f"transform: got {type(transform).__name__}, expected a callable transform(nodes)")
        if self.at:
            raise ValueError("transform: got one for a field with losses at given times, expected a field without at=")
        field = copy.copy(self)
        field.transforms = (*self.transforms, transform)
        field._runs = (*self._runs, transform)
        return field

    def driven_by(self, costate: Any) -> VectorField:
        """Return the plain field f + eta * costate(t), for any ODE solver.

        Args:
            costate: a function of time, such as the ``costate`` of a solution. The time is a float, or a 0-d tensor if
                the solver differentiates with respect to time, see `Forcing`. The costate of a solution is extrapolated
                outside its span, because adaptive solvers step beyond the end.
        """
        value = getattr(costate, "extrapolated", costate)
        forcing = Forcing(value, scale=self.eta * self._rate, on=getattr(costate, "on", None), source=costate)
        return VectorField({"f": self.f, "costate": forcing}, self.problem)

    def widened(self, narrow: torch.dtype) -> AdversarialField:
        """See `VectorField.widened`. Read-out, losses and running cost also receive the state in ``narrow``."""
        field, readout, running = super().widened(narrow), self.readout, self.running
        field.readout = lambda x: x.to(narrow) if readout is None else readout(x.to(narrow))
        field.running = running and (lambda t, x: running(t, x.to(narrow)))
        field.at = {t: _widened_loss(loss, narrow) for t, loss in self.at.items()}
        return field

    def timed(self, span: MovingSpan) -> AdversarialField:
        """See `VectorField.timed`. The rate also multiplies eta and the running cost."""
        field, running = super().timed(span), self.running
        field._rate = span.rate
        field.running = running and (lambda t, x: span.rate * running(span(t), x))
        return field

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the loss of the final state ``x``.

        Raises:
            TypeError, ValueError: if the loss is not a real scalar tensor, or if the read-out or the loss writes to its
                argument.
        """
        output = x
        if self.readout is not None:
            before = version(x)
            output = self.readout(x)
            check_unmodified("readout", x, before)
        return output, self._checked("loss", self.loss, output)

    def loss_at(self, loss: Loss, x: Tensor) -> Tensor:
        """Return ``loss(x)`` for a loss of ``at`` and the state ``x``. The errors are those of `evaluate`."""
        return self._checked("at", loss, x)

    def running_cost(self, t: float | Tensor, x: Tensor) -> Tensor:
        """Return the running cost at the time ``t`` and the state ``x``. The errors are those of `evaluate`."""
        running = self.running
        assert running is not None
        return self._checked("running", lambda y: running(as_time(t, y, self.f.time_dtype), y), x)

    @staticmethod
    def _checked(name: str, function: Loss, x: Tensor) -> Tensor:
        before = version(x)
        loss = function(x)
        check_unmodified(name, x, before)
        if not isinstance(loss, Tensor):
            raise TypeError(f"{name}: returned {type(loss).__name__}, expected a scalar tensor")
        if loss.ndim != 0:
            raise ValueError(
                f"{name}: returned shape {tuple(loss.shape)}, expected a scalar; reduce it, e.g. with .mean() over the "
                "batch (the convention eta refers to)"
            )
        if loss.is_complex():
            raise TypeError(f"{name}: returned {loss.dtype}, expected a real scalar; take .real or .abs() of it")
        return loss

    def __repr__(self) -> str:
        eta = f"{tuple(self.eta.shape)} tensor" if isinstance(self.eta, Tensor) else f"{self.eta:g}"
        return f"{type(self).__name__}(f, costate, eta={eta}{', transformed' if self.transforms else ''})"


def as_field(field: VectorField | Operator | VectorFunction) -> VectorField:
    """Return ``field`` as a `VectorField`. A callable or an `Operator` becomes a field with a single operator "f".

    Args:
        field: a callable ``f(t, x)``, an `Operator`, or a field, which is returned as it is.
    """
    if isinstance(field, VectorField):
        return field
    if not callable(field):
        raise TypeError(
            f"field: got {type(field).__name__}, expected a callable f(t, x), an Operator, a SplitField or an "
            "AdversarialField; the field is the first argument, before the state"
        )
    return VectorField({"f": field})


def _read_eta(eta: Any) -> float | Tensor:
    """Return ``eta`` as a float. Return a tensor unchanged if it has axes or may receive a gradient."""
    if not isinstance(eta, Tensor) or not (eta.ndim or eta.requires_grad or is_wrapped(eta)):
        return number("eta", eta)
    if not eta.is_floating_point():
        raise TypeError(f"eta: got a tensor of {eta.dtype}, expected a real floating dtype")
    if not (is_wrapped(eta) or bool(eta.isfinite().all())):
        raise ValueError("eta: contains NaN or infinite values, expected finite ones")
    return eta


def _nothing(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        return torch.zeros(())
    return torch.zeros((), dtype=output.real.dtype if output.is_complex() else output.dtype, device=output.device)


def _timed_losses(at: Any) -> dict[float, Loss]:
    """Return the dict ``at`` with its times as floats.

    Raises:
        TypeError: if ``at`` is not a mapping from times to callables.
    """
    if at is not None and not isinstance(at, Mapping):
        raise TypeError(f"at: got {type(at).__name__}, expected a dict of time to loss(x)")
    for t, loss in (at or {}).items():
        if not callable(loss):
            raise TypeError(f"at: got {type(loss).__name__} at {t!r}, expected a callable loss(x)")
    return {number("at", t): loss for t, loss in (at or {}).items()}


def _widened_loss(loss: Loss, narrow: torch.dtype) -> Loss:
    return lambda x: loss(x.to(narrow))


def _named_operator(name: str, f: Any) -> Operator:
    if not callable(f):
        raise TypeError(f"{name}: got {type(f).__name__}, expected a callable f(t, x) or an Operator")
    return _whole(f) if isinstance(f, VectorField) else Operator(f)


def _whole(field: VectorField) -> Operator:
    """Return the operators of ``field`` as one operator."""
    operators = tuple(field.operators.values())
    return operators[0] if len(operators) == 1 else Sum(operators, tuple(field.operators))
