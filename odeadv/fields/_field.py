"""Vector fields: named sums of operators, with or without the problem they are to be solved on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from odeadv.fields.operator import Operator, VectorFunction
from odeadv.fields.terms import Forcing, Sum, Unrecorded
from odeadv.support.checks import number
from odeadv.support.discovery import modules_of
from odeadv.support.isolation import check_unmodified, version

NodeTransform = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Problem:
    """What a field is solved on; whatever is None must be given to `odeadv.solve`.

    Attributes:
        x0: the initial state, or a function without arguments that computes it anew for each solve.
        t_span: start and end time.
        dt: step size (give this or ``steps``).
        steps: number of steps.
    """

    x0: Tensor | Callable[[], Tensor] | None = None
    t_span: tuple[float, float] | None = None
    dt: float | None = None
    steps: int | None = None


class VectorField:
    """dx/dt = sum of ``operators``; callable as ``field(t, x)``, so it runs in any solver of that convention.

    Args:
        operators: name to operator (or callable ``f(t, x)``), in the order the schemes number them.
        problem: what to solve it on, if the field carries that itself.
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

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """The whole right-hand side, all operators added up. ``x``: the state; returns its shape."""
        values = [operator(t, x) for operator in self.operators.values()]
        return sum(values[1:], start=values[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.operators)})"


class SplitField(VectorField):
    """A field given as a sum of named operators, dx/dt = sum_p f_p(t, x), for operator splitting.

    The order of the names is the order of the operators in a scheme: Lie-Trotter takes them as listed; Strang takes
    the first for the full step, the later ones around it, the last one outermost (the paper's Eq. 20 with F first).

    Args:
        x0, t_span, dt, steps: the problem, if the field is to carry it (these names are not available to operators).
        operators: callables ``f(t, x)`` or `Operator` objects, at least two.

    Raises:
        ValueError: with fewer than two operators.
    """

    def __init__(
        self,
        *,
        x0: Tensor | Callable[[], Tensor] | None = None,
        t_span: tuple[float, float] | None = None,
        dt: float | None = None,
        steps: int | None = None,
        **operators: Operator | VectorFunction,
    ) -> None:
        if len(operators) < 2:
            raise ValueError(
                f"operators: got {len(operators)} ({', '.join(operators) or 'none'}), expected at least two; a field "
                "with one operator is solved by passing the callable itself"
            )
        super().__init__(operators, Problem(x0, t_span, dt, steps))


class AdversarialField(VectorField):
    """The paper's Eq. 7, dx/dt = f(t, x) + eta * dL/dx(t): the state is pushed up the loss by its costate.

    dL/dx(t) is the costate a(t) of Eq. 9, a(T) = grad L(x(T)), which needs the whole trajectory; `odeadv.solve`
    records it before it solves (see its arguments ``sweeps``, ``ascent`` and ``costate``). The operators are named
    ``"f"`` and ``"costate"``.

    Args:
        f: ``f(t, x)``, an `Operator`, or another field, whose operators are then added up.
        loss: ``loss(output)``, a scalar tensor, of the final state (or of ``readout`` of it).
        eta: strength, any finite number; eta > 0 pushes the loss up (down where time runs backward, for then the
            equation's right-hand side is subtracted). It scales the gradient of ``loss`` as it is: with a mean over a
            batch, eta / batch_size is what is invariant.
        readout: map from the final state to the output (logits of a network); the state itself if not given.
        x0, t_span, dt, steps: the problem, if the field is to carry it.
        modules: modules that ``f``, ``readout`` or ``loss`` run and that cannot be found from them, see `Operator`.

    Attributes:
        transforms: what `transformed` has put between a recording and the drive, in turn.

    Raises:
        TypeError: if ``f``, ``loss`` or ``readout`` is not callable, or ``eta`` not a number.
        ValueError: if ``eta`` is not finite.
    """

    #: Records a costate from a field and an initial state: `odeadv.driven`, which the solver puts here.
    _recorder: ClassVar[Callable[[AdversarialField, Tensor], VectorField]]

    def __init__(
        self,
        f: Operator | VectorFunction,
        loss: Callable[[Tensor], Tensor],
        eta: float,
        *,
        readout: Callable[[Tensor], Tensor] | None = None,
        x0: Tensor | Callable[[], Tensor] | None = None,
        t_span: tuple[float, float] | None = None,
        dt: float | None = None,
        steps: int | None = None,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        if not callable(loss):
            raise TypeError(f"loss: got {type(loss).__name__}, expected a callable loss(x) returning a scalar tensor")
        if readout is not None and not callable(readout):
            raise TypeError(f"readout: got {type(readout).__name__}, expected a callable readout(x) or None")
        self.eta = number("eta", eta)
        self.loss = loss
        self.readout = readout
        self.transforms: tuple[NodeTransform, ...] = ()
        self._modules = modules_of(loss, readout, *modules)
        self._drive: VectorField | None = None
        self._driven_in = -1
        operator = (
            f if isinstance(f, Operator) else _whole(f) if isinstance(f, VectorField) else _named_operator("f", f)
        )
        super().__init__({"f": operator, "costate": Unrecorded()}, Problem(x0, t_span, dt, steps))

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """f(t, x) + eta * a(t) for other solvers, on the ``t_span`` and by the ``dt`` or ``steps`` the field carries.

        An evaluation at the start of the span is taken for the start of a solve: the costate is recorded from there,
        by `odeadv.driven` with its defaults, and drives until the next such evaluation. So every solve has the
        recording of its own initial state and weights, and a method that evaluates the start twice records twice.
        A backward pass that evaluates the field again, as ``odeint_adjoint`` does, would meet the recording of the
        latest solve, whichever it is of: give it `odeadv.driven`, which keeps its own.

        Args:
            t: 0-d tensor.
            x: the state; returns its shape.

        Raises:
            TypeError: if the field has no span or steps, or is evaluated elsewhere before it was at the start; or
                within a backward pass, but for a solve that begins there, or outside after such a one.
            ValueError, SolveError: see `odeadv.driven`.
        """
        if self._starts_at(t):
            self._drive = type(self)._recorder(self, x.detach())
            self._driven_in = _backward_pass()
        elif self._drive is None:
            return super().__call__(t, x)  # which says what to do
        elif self._driven_in != _backward_pass():
            raise TypeError(
                "field: evaluated within a backward pass (odeint_adjoint?), where the recording of another solve may "
                "have taken the place of its own; give the solver odeadv.driven(field, x0, t_span, steps=...), which "
                "keeps one"
            )
        return self._drive(t, x)

    def _starts_at(self, t: Tensor) -> bool:
        """Whether ``t`` is the start of the span up to rounding; False if the field does not carry its steps."""
        problem = self.problem
        if problem.t_span is None or (problem.dt is None and problem.steps is None):
            return False
        rounding = 4 * torch.finfo(t.dtype).eps * max(map(abs, problem.t_span))
        return abs(float(t.detach()) - problem.t_span[0]) <= rounding

    @property
    def f(self) -> Operator:
        """The unperturbed operator."""
        return self.operators["f"]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that an evaluation of the field, its read-out or its loss runs."""
        return modules_of(self.f, *self._modules)

    def transformed(self, transform: NodeTransform) -> AdversarialField:
        """The same field, whose costate passes through ``transform`` after each recording, before it drives.

        For ablations: noise of the same norm, gradients shuffled across the batch, the first node only. With several
        recordings (``sweeps``, ``ascent``) each is transformed once. ``sol.costate`` is then the transformed one. A
        second transform acts on the result of the first.

        Args:
            transform: ``transform(nodes)``, from the N + 1 recorded a(t_n), each of the shape of the state at t_n, to
                as many tensors of the same shapes, dtypes and devices. Without gradients, unless the costate is
                differentiated. The global random state is put back after it: draw from a generator of your own.

        Raises:
            TypeError: if ``transform`` is not callable.
        """
        if not callable(transform):
            raise TypeError(f"transform: got {type(transform).__name__}, expected a callable transform(nodes)")
        field = copy.copy(self)
        field._drive = None
        field.transforms = (*self.transforms, transform)
        field._modules = modules_of(*self._modules, transform)
        return field

    def driven_by(self, costate: Any) -> VectorField:
        """The field with dL/dx(t) given: a plain field f + eta * costate(t), usable in any ODE solver.

        Args:
            costate: a function of a float time, such as the ``costate`` of a solution, which is then extrapolated a
                little beyond its span, since adaptive solvers overshoot the end.
        """
        value = getattr(costate, "extrapolated", costate)
        forcing = Forcing(value, scale=self.eta, on=getattr(costate, "on", None), source=costate)
        return VectorField({"f": self.f, "costate": forcing}, self.problem)

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output and loss of the final state ``x``.

        Raises:
            TypeError, ValueError: if the loss is not a scalar tensor.
        """
        output = x
        if self.readout is not None:
            before = version(x)
            output = self.readout(x)
            check_unmodified("readout", x, before)
        before = version(output)
        loss = self.loss(output)
        check_unmodified("loss", output, before)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss: returned {type(loss).__name__}, expected a scalar tensor")
        if loss.ndim != 0:
            raise ValueError(
                f"loss: returned shape {tuple(loss.shape)}, expected a scalar; reduce it, e.g. with .mean() over the "
                "batch (the convention eta refers to)"
            )
        if loss.is_complex():
            raise TypeError(f"loss: returned {loss.dtype}, expected a real scalar; take .real or .abs() of it")
        return output, loss

    def __repr__(self) -> str:
        return f"{type(self).__name__}(f, costate, eta={self.eta:g}{', transformed' if self.transforms else ''})"


def _backward_pass() -> int:
    """The number of the backward pass that is running; -1 outside of any."""
    return torch._C._current_graph_task_id()


def as_field(field: VectorField | Operator | VectorFunction) -> VectorField:
    """``field`` as a `VectorField`: a plain callable or an `Operator` becomes a field with the one operator "f"."""
    if isinstance(field, VectorField):
        return field
    if not callable(field):
        raise TypeError(
            f"field: got {type(field).__name__}, expected a callable f(t, x), an Operator, a SplitField or an "
            "AdversarialField"
        )
    return VectorField({"f": field})


def _named_operator(name: str, f: Any) -> Operator:
    if not callable(f):
        raise TypeError(f"{name}: got {type(f).__name__}, expected a callable f(t, x) or an Operator")
    return _whole(f) if isinstance(f, VectorField) else Operator(f)


def _whole(field: VectorField) -> Operator:
    """The operators of ``field`` as one."""
    operators = tuple(field.operators.values())
    return operators[0] if len(operators) == 1 else Sum(operators, tuple(field.operators))
