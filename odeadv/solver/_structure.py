"""States that are tuples, lists, dicts or named tuples of tensors: a vector for the solver, a structure for users.

The solver works with one vector. This module wraps the user's functions so that they receive the structure, and it
converts the solution back to the structure.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from odeadv.costate import Costate
from odeadv.fields import AdversarialField, Newton, Operator, Piecewise, VectorField, as_field
from odeadv.fields.operator import Jump, same_shape
from odeadv.fields.residual import Residual
from odeadv.fields.terms import Forcing, Sum, Unrecorded
from odeadv.solver._solution import Solution
from odeadv.solver._trees import is_structure, items, named_tensors, rebuilt
from odeadv.splitting import Adaptive, Grid
from odeadv.support.checks import shown

#: A state: a tensor, or tensors in a structure.
State = Tensor | Sequence[Any] | Mapping[Any, Any]


class Layout:
    """The order of the tensors of a structure in one vector.

    Args:
        example: the structure, with tensors of one dtype on one device.

    Raises:
        TypeError: if ``example`` contains anything except tensors, tuples, lists and mappings.
        ValueError: if ``example`` does not contain tensors, or contains different dtypes or devices.
    """

    def __init__(self, example: Any) -> None:
        found = list(named_tensors(example, "x0"))
        if not found:
            raise ValueError("x0: got a structure without tensors, expected at least one")
        (first, like), *others = found
        for name, tensor in others:
            if (tensor.dtype, tensor.device) != (like.dtype, like.device):
                raise ValueError(
                    f"{name}: got {tensor.dtype} on {tensor.device}, expected {like.dtype} on {like.device} as for "
                    f"{first}, since all tensors of a state become one vector"
                )
        self.example = example
        self.shapes = [tensor.shape for _, tensor in found]
        self._ends = list(pairwise(accumulate((shape.numel() for shape in self.shapes), initial=0)))

    def vector(self, value: Any, name: str) -> Tensor:
        """Return the tensors of ``value`` as one vector, with zeros for None. Messages name ``value`` by ``name``.

        Raises:
            TypeError, ValueError: if ``value`` does not have the structure of the state.
        """
        return torch.cat([tensor.reshape(-1) for tensor in _matched(self.example, value, name)])

    def parts(self, x: Tensor) -> list[Tensor]:
        """Return the tensors that the vector ``x`` consists of. Leading axes of ``x`` are kept in each tensor."""
        return [
            x[..., a:b].reshape(x.shape[:-1] + shape) for (a, b), shape in zip(self._ends, self.shapes, strict=True)
        ]

    def structure(self, x: Tensor) -> Any:
        """Return the vector ``x`` as the structure. Leading axes of ``x`` are kept in each tensor."""
        return rebuilt(self.example, iter(self.parts(x)))


def _matched(example: Any, value: Any, name: str) -> Iterator[Tensor]:
    """Yield the tensors of ``value`` in the order of ``example``."""
    if isinstance(example, Tensor):
        yield torch.zeros_like(example) if value is None else same_shape(name, value, example)
        return
    expected = [key for key, _ in items(example)]
    found = dict(items(value)) if is_structure(value) else None
    if found is None or isinstance(value, Mapping) != isinstance(example, Mapping) or found.keys() != set(expected):
        got = type(value).__name__ if found is None else f"{type(value).__name__} of {', '.join(map(repr, found))}"
        raise TypeError(
            f"{name}: returned {got}, expected {type(example).__name__} of {', '.join(map(repr, expected))}, like the "
            "state"
        )
    for key, part in items(example):
        yield from _matched(part, found[key], f"{name}[{key!r}]")


def read_structure(field: Any, x0: Any, dt: Any, rtol: Any, atol: Any) -> tuple[Any, Flattened | None]:
    """Return the pair (initial state, None), or (None, arguments for a vector) if the state is a structure.

    If the state is given as a function, the function is called only once here, and replaced by its result.

    Raises:
        TypeError, ValueError: if an argument does not fit the structure. The message names the argument.
    """
    if not callable(field):
        as_field(field)  # raises. Field and state may be swapped, and then x0 below would be called as a state.
    given = as_field(field).problem.x0 if x0 is None else x0
    state = given() if callable(given) and not isinstance(given, Tensor) else given
    if is_structure(state):
        return None, Flattened.of(field, state, dt, rtol, atol)
    return x0 if state is given else lambda: state, None


@dataclass(frozen=True)
class Flattened:
    """The arguments of `odeadv.solve` after the conversion of a structure to a vector.

    Attributes:
        layout: layout of the structure in the vector.
        field: a field for vectors. It calls the user's functions with the structure.
        x0: the initial state as a vector.
        dt: as for `odeadv.solve`. The norm of adaptive steps is the largest norm of all tensors.
        rtol: as for `odeadv.solve`. None if it is part of ``dt``.
        atol: as for `odeadv.solve`. None if it is part of ``dt``.
    """

    layout: Layout
    field: VectorField
    x0: Tensor
    dt: Any
    rtol: Any
    atol: Any

    @staticmethod
    def of(field: Any, x0: Any, dt: Any, rtol: Any, atol: Any) -> Flattened:
        """Convert the arguments for a structure to arguments for a vector.

        Raises:
            TypeError, ValueError: if an argument does not fit the structure. The message names the argument.
        """
        layout = Layout(x0)
        if isinstance(dt, str) and dt == "adaptive":
            given = {name: value for name, value in (("rtol", rtol), ("atol", atol)) if value is not None}
            dt = Adaptive(**{name: _tolerance(layout, name, value) for name, value in given.items()})
            rtol = atol = None
        if isinstance(dt, Adaptive):
            tolerances = {name: _tolerance(layout, name, getattr(dt, name)) for name in ("rtol", "atol")}
            dt = replace(dt, norm=_norm(layout, dt), **tolerances)
        return Flattened(layout, _seen_as(as_field(field), layout), layout.vector(x0, "x0"), dt, rtol, atol)

    def restored(self, solution: Solution) -> Solution:
        """Return ``solution`` with states, output and costate as structures."""
        layout, record, dense = self.layout, solution._record, solution._dense
        assert isinstance(solution.xs, Tensor)
        solution.xs, solution._structured = layout.structure(solution.xs), True
        if solution.output is not None and isinstance(self.field, AdversarialField) and self.field.readout is None:
            solution.output = layout.structure(solution.output)
        solution._costate = solution._costate and StructuredCostate(solution._costate, layout)
        if record is not None:
            solution._record = lambda: (found := record()) and StructuredCostate(found, layout)
        if dense is not None:
            solution._dense = lambda t: layout.structure(dense(t))
        return solution


def _tolerance(layout: Layout, name: str, value: Any) -> Any:
    if is_structure(value):
        return layout.vector(value, name)
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(f"{name}: got {shown(value)}, expected a number, or a structure like the state")
    return value


def _norm(layout: Layout, settings: Adaptive) -> Callable[[Tensor], Tensor]:
    """Return the norm of a vector: the largest norm of its tensors, or the user's norm of the structure."""
    given = settings.norm
    if callable(given):
        return lambda ratio: given(layout.structure(ratio))
    return lambda ratio: torch.stack([settings.size(part) for part in layout.parts(ratio) if part.numel()]).max()


def _seen_as(field: VectorField, layout: Layout) -> VectorField:
    """Return a field for the state as a vector. Its functions are called with the structure."""
    seen = copy.copy(field)
    seen.operators = {name: _operator(name, operator, layout) for name, operator in field.operators.items()}
    if not isinstance(field, AdversarialField) or not isinstance(seen, AdversarialField):
        return seen
    if isinstance(field.eta, Tensor) and field.eta.ndim:
        raise ValueError(
            f"eta: got {shown(field.eta)} for a state of several tensors, expected a number or a tensor of no dimension"
        )
    inward, running = layout.structure, field.running
    if field.readout is None:
        seen.loss = _after(inward, field.loss)
    else:
        seen.readout = _after(inward, field.readout)
    seen.running = running and (lambda t, x: running(t, inward(x)))
    seen.at = {t: _after(inward, loss) for t, loss in field.at.items()}
    seen.transforms = tuple(_of_vectors(transform, layout) for transform in field.transforms)
    return seen


def _after(inward: Callable[[Tensor], Any], function: Callable[[Any], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(inward(x))


def _of_vectors(transform: Callable[[Any], Any], layout: Layout) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    def transformed(nodes: Sequence[Tensor]) -> list[Tensor]:
        given = transform(tuple(layout.structure(node) for node in nodes))
        return [layout.vector(node, "transform") for node in given]

    return transformed


def _operator(name: str, operator: Any, layout: Layout) -> Any:
    """Return the operator for vectors. It calls the functions of ``operator`` with the structure."""
    if isinstance(operator, Unrecorded):
        return operator
    if isinstance(operator, Sum):
        return Sum([_operator(name, term, layout) for term in operator.operators], operator.names, operator.costs)
    if isinstance(operator, Piecewise):
        return Piecewise([_operator(name, piece, layout) for piece in operator.pieces], operator.edges)
    if isinstance(operator, Residual):
        block = operator.block
        return Residual(lambda x: layout.vector(block(layout.structure(x)), operator.name), name=operator.name)
    if isinstance(operator, Forcing):
        value = operator.value
        return Forcing(lambda t: layout.vector(value(t), name), scale=operator.scale)
    if isinstance(operator, Jump) or type(operator) is not Operator:
        raise TypeError(
            f"x0: got a state of several tensors, but {name!r} is a {type(operator).__name__}, which needs one tensor"
        )
    f, flow, solve = operator.f, operator.flow, operator.solver
    other = Operator(
        (lambda t, x: layout.vector(f(t, layout.structure(x)), name)) if "f" in operator.abilities else None,
        flow=flow and (lambda t, dt, x: layout.vector(flow(t, dt, layout.structure(x)), f"{name}: flow")),
        solve=_solver(name, solve, layout),
        modules=operator.modules,
        reversible=operator.reversible,
    )
    other.time_dtype = operator.time_dtype
    return other


def _solver(name: str, solve: Any, layout: Layout) -> Any:
    """Return the implicit solver for vectors. It calls the user's functions with the structure."""
    if not isinstance(solve, Newton):
        return lambda t, c, b: layout.vector(solve(t, c, layout.structure(b)), f"{name}: solve")
    if solve.samples != ():
        raise ValueError(
            f"solve: got Newton(samples={solve.samples!r}) for operator {name!r}, expected none, since a state "
            "of several tensors is one vector"
        )
    inner = solve.precondition
    if inner is None:
        return solve
    structure = layout.structure
    return replace(
        solve, precondition=lambda t, c, y, r: layout.vector(inner(t, c, structure(y), structure(r)), "precondition")
    )


class StructuredCostate:
    """A costate with values that have the structure of the state.

    Attributes:
        flat: the costate with vectors as values.
    """

    def __init__(self, flat: Costate, layout: Layout) -> None:
        self.flat, self._layout = flat, layout

    @property
    def grid(self) -> Grid:
        """The grid of the recording."""
        return self.flat.grid

    @property
    def nodes(self) -> list[Any]:
        """The costates at the times of ``grid``."""
        return [self._layout.structure(node) for node in self.flat.nodes]

    def __call__(self, t: Any) -> Any:
        """Return a(t), with the structure of the state."""
        return self._layout.structure(self.flat(t))

    def extrapolated(self, t: Any) -> Any:
        """Return a(t), also for times outside the span."""
        return self._layout.structure(self.flat.extrapolated(t))

    def on(self, t0: float, t1: float) -> Callable[[float], Any]:
        """Return a(t) restricted to the step from ``t0`` to ``t1``."""
        inner = self.flat.on(t0, t1)
        return lambda t: self._layout.structure(inner(t))
