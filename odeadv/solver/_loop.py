"""Many steps as one call: a loop operator over the graph of a step, forward and in reverse.

`torch.compile` reads the step twice. The first time it captures the step as a graph, with guards on everything that the
field depends on, and turns the tensors that the field closes over into inputs. The second time it lowers a
`torch.while_loop` over this graph to C++; for small states `_scalars` takes the place of the second time. Only public
interfaces are used; ``torch.while_loop`` is a prototype in torch 2.14, on which this file was tested.
`tests/test_compile.py` says if a later version breaks it.
"""

from __future__ import annotations

import inspect
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from odeadv.solver._scalars import compiler, forward_loop, reverse_loop
from odeadv.splitting import TimeStep

# step(number, x, clock, *rows) -> the state at the end of step ``number`` from ``x`` at its beginning. ``clock`` is
# (t0, t1, h, number of steps) in float64, and ``rows`` are given data of this step.
StepFunction = Callable[..., Tensor]
Tensors = tuple[Tensor, ...]
# before(clock, *lifted) -> what is the same for every step.
Invariants = Callable[..., Tensors]

# An iteration of the loop costs a microsecond, so short steps share one: up to 8, with about this many operations.
OPERATIONS = 400
SMALL = 1000  # elements of a state whose steps cost more calls than arithmetic


# Every solver has graphs of its own, one per kind of state.
_OWN_GRAPHS: dict[str, Any] = {"fullgraph": True, "isolate_recompiles": True, "recompile_limit": 64}


class CompileWarning(UserWarning):
    """A solve is not compiled as a whole."""


def time_step(number: Tensor, clock: Tensor) -> TimeStep:
    """Return step ``number`` as tensors, with the ends that the grid of a solve has."""
    t0, t1, h, count = clock.unbind()
    after = number + 1
    end = torch.where(after == count, t1, t0 + after * h)
    return TimeStep(t0 + number * h, end, h)  # type: ignore[arg-type]  # tensors: one graph serves all steps


class Steps:
    """The steps of ``step``, to be run on given tensors by `on`.

    Args:
        step: as for `StepFunction`.
        options: for `torch.compile`.
        static: as for `odeadv.compile_solver`.

    Raises:
        ValueError: if this version of torch cannot compile a solver.
    """

    def __init__(self, step: StepFunction, options: dict[str, Any], static: bool = False) -> None:
        if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
            raise ValueError(
                f"torch: got version {torch.__version__}, expected 2.13 or newer to compile a solver; use odeadv.solve"
            )
        self._options, self._static = options, static
        self._kept: dict[tuple[object, ...], BoundSteps] = {}
        self._capture = torch.compile(step, **{**_OWN_GRAPHS, "backend": self._bind, "dynamic": False})
        self._given: Tensors = ()
        self._bound: BoundSteps

    def on(self, x: Tensor, clock: Tensor, tables: Tensors = ()) -> BoundSteps:
        """Return the steps with all that they depend on, captured if they have changed.

        Args:
            x: a state.
            clock: as for `StepFunction`.
            tables: data by steps, N + 1 rows each. Step n is given the rows n and n + 1 of each in turn.
        """
        key = (x.shape, x.dtype, x.device)
        if key in self._kept:
            return replace(self._kept[key], clock=clock, tables=tables)
        rows = [torch.empty_like(x) for _ in range(2 * len(tables))]
        self._given = (torch.zeros((), dtype=torch.int64, device=x.device), x.detach(), clock, *rows)
        with torch.no_grad():
            self._capture(*self._given)
        self._bound.tables = tables
        if self._static:
            self._kept[key] = replace(self._bound, tables=())
        return self._bound

    def _bind(self, graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Tensors]:
        """Keep ``graph`` and its inputs instead of running it: the backend of the first compilation."""
        loops: list[_Loops] = []

        def bind(*inputs: Tensor) -> Tensors:
            numbers = {id(tensor): k for k, tensor in enumerate(self._given)}
            places = [numbers.get(id(tensor)) for tensor in inputs]
            lifted = tuple(tensor for tensor, place in zip(inputs, places, strict=True) if place is None)
            if not loops:
                loops.append(_Loops(graph, places, self._given, lifted, self._options))
            self._bound = BoundSteps(loops[0], self._given[2], lifted)
            return (self._given[1],)

        return bind


@dataclass
class BoundSteps:
    """Steps on given tensors.

    Attributes:
        loops: the compiled loops.
        clock: as for `StepFunction`.
        lifted: the tensors that the field closes over.
        tables: as for `Steps.on`.
    """

    loops: _Loops
    clock: Tensor
    lifted: Tensors
    tables: Tensors = ()

    def ends(self, x: Tensor) -> tuple[Tensor, bool | None]:
        """Return ``x`` and the last state as the rows of a tensor, and True if they are finite, None if unknown."""
        if self._learns(x):
            return torch.stack([x, self.states(x)[-1]]), None
        return self._run(x, None)

    def states(self, x: Tensor) -> Tensor:
        """Return the N + 1 states from ``x`` on as the rows of a tensor, in the autograd graph."""
        if self._learns(x):
            states: Tensor = _Differentiable.apply(self, x, *[p for p in self.lifted if p.requires_grad])
            return states
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the states as `states` does, outside of the graph."""
        states = _by_rows(x.new_empty((int(self.clock[3]) + 1, *x.shape)))
        states[0] = x.detach()
        self._run(x, states)
        return states

    def _learns(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.lifted))

    def _run(self, x: Tensor, states: Tensor | None) -> tuple[Tensor, bool | None]:
        x = x.detach().contiguous()
        tables = tuple(_by_rows(table.detach()) for table in self.tables)
        found: tuple[Tensor, bool | None]
        if self.loops.takes_anything:
            found = self.loops.forward(x, self.clock, states, tables, self.lifted)
            return found
        with torch.no_grad():
            fixed = _apart((*self.lifted, *self.loops.before(self.clock, *self.lifted)))
            found = self.loops.forward(x, self.clock, states, tables, fixed)
        return found

    def costates(self, states: Tensor, given: Tensor, *, learned: bool = False) -> tuple[Tensor, Tensors]:
        """Return dL/dx_n, from the partial derivatives ``given`` by each of the ``states``; in reverse.

        Returns:
            dL/dx_n as the rows of a tensor, and, if ``learned``, the derivatives by those lifted tensors that require a
            gradient.
        """
        wrt = tuple(k for k, p in enumerate(self.lifted) if learned and p.requires_grad)
        nodes = given.detach().clone(memory_format=torch.contiguous_format)
        tables = tuple(_by_rows(table.detach()) for table in self.tables)
        sums = tuple(torch.zeros_like(self.lifted[k], memory_format=torch.contiguous_format) for k in wrt)
        with torch.no_grad():
            before, reverse = self.loops.reverse(wrt)
            fixed = _apart((*self.lifted, *before(self.clock, *self.lifted)))
            _, *found = reverse(_by_rows(nodes), self.clock, _by_rows(states.detach()), tables, fixed, sums)
        return nodes, tuple(found)

    def eager(self, x: Tensor, lifted: Tensors) -> Tensor:
        """Return all states by operations of torch alone, so that they have derivatives of every order."""
        states = [x]
        for n in range(int(self.clock[3])):
            rows = tuple(row for table in self.tables for row in (table[n], table[n + 1]))
            number = torch.tensor(n, device=x.device)
            states.append(self.loops.step(number, states[-1], self.clock, *rows, *lifted))
        return torch.stack(states)


class _Differentiable(torch.autograd.Function):
    """The states with their gradient by the discrete adjoint equation."""

    @staticmethod
    def forward(ctx: Any, bound: BoundSteps, x: Tensor, *learned: Tensor) -> Tensor:
        states = bound.forward(x)
        ctx.bound = bound
        # The tensor of a caller may be written to before the backward pass.
        ctx.save_for_backward(states, x if ctx.needs_input_grad[1] else states[0].clone(), *learned)
        return states

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        bound: BoundSteps = ctx.bound
        states, x, *learned = ctx.saved_tensors
        if torch.is_grad_enabled():  # derivatives of the result are wanted
            others = iter(learned)
            again = bound.eager(x, tuple(next(others) if p.requires_grad else p for p in bound.lifted))
            wanted = [p for p in (x, *learned) if p.requires_grad]
            found = iter(torch.autograd.grad(again, wanted, given, create_graph=True, materialize_grads=True))
            return (None, *(next(found) if p.requires_grad else None for p in (x, *learned)))
        nodes, sums = bound.costates(states, given, learned=True)
        return (None, nodes[0], *sums)


class _Loops:
    """The loops over the graph of a step.

    Args:
        graph: of the step.
        places: for each input of the graph, its number among the arguments of the step; None for a lifted tensor.
        given: arguments of the step.
        lifted: the other inputs.
        options: for torch.compile.
    """

    def __init__(
        self,
        graph: nn.Module,
        places: Sequence[int | None],
        given: Tensors,
        lifted: Tensors,
        options: dict[str, Any],
    ) -> None:
        self._options, self._own = options, len(given)
        self._examples = tuple(torch.zeros_like(tensor) for tensor in (*given, *lifted))
        reason = _why_not(given[1].device, options)
        self._whole = reason is None

        def ordered(*inputs: Tensor) -> Tensor:
            others = iter(inputs[len(given) :])
            end: Tensor = graph(*(next(others) if place is None else inputs[place] for place in places))[0]
            return end

        self.step = _flat(ordered, self._examples)
        self.before, once = _hoisted(self.step, self._varying)
        self._together = _steps_of_an_iteration(once)
        self._fast: Callable[..., Tensor] = once
        self._tables = (self._own - 3) // 2
        self._own_code = self._whole and not options
        if reason is not None:
            warnings.warn(f"compile_solver: {reason}, so the loop over the steps stays in Python", CompileWarning, 2)
            if given[1].device.type != "cpu":
                self._fast = torch.compile(once, **_OWN_GRAPHS)
        loop = self._scalar_code(forward_loop, self.step, once)
        # Inputs of code of our own may share memory and require gradients.
        self.takes_anything = loop is not None and loop[1] is self.step
        self.forward = self._compiled(self._forward) if loop is None else loop[0]
        self._reversed: dict[tuple[int, ...], tuple[Invariants, Callable[..., Tensors]]] = {}

    @property
    def _varying(self) -> list[int]:
        """The numbers of the arguments of a step that differ from step to step: all but clock and lifted tensors."""
        return [k for k in range(self._own) if k != 2]

    def reverse(self, wrt: tuple[int, ...]) -> tuple[Invariants, Callable[..., Tensors]]:
        """Return the loop in reverse, with derivatives by the lifted tensors of the numbers ``wrt``.

        Returns:
            A function of the clock and the lifted tensors, to be called once before the loop; and the loop.
        """
        if wrt not in self._reversed:
            examples = (*self._examples, torch.zeros_like(self._examples[1]))
            pull = _flat(partial(self._pull, wrt), examples)
            before, once = _hoisted(pull, [*self._varying, len(self._examples)])
            lifted = len(self._examples) - self._own
            found = self._scalar_code(partial(reverse_loop, lifted=lifted), pull, once)
            if found is not None:
                self._reversed[wrt] = _nothing if found[1] is pull else before, found[0]
            else:
                loop = self._compiled(partial(self._reverse, once, _steps_of_an_iteration(once)))
                self._reversed[wrt] = before, loop
        return self._reversed[wrt]

    def _scalar_code(
        self, make: Callable[..., Callable[..., Any] | None], *graphs: torch.fx.GraphModule
    ) -> tuple[Callable[..., Any], torch.fx.GraphModule] | None:
        """Return the loop over the first of ``graphs`` that `_scalars` can write, and this graph; None without one."""
        for graph in graphs if self._own_code else ():
            loop = make(graph, tables=self._tables)
            if loop is not None:
                return loop, graph
        return None

    def _pull(self, wrt: tuple[int, ...], *inputs: Tensor) -> Tensors:
        """Return the vector-Jacobian product of a step: by the state, and by the lifted tensors ``wrt``."""
        *given, a = inputs
        chosen = (1, *(self._own + k for k in wrt))

        def step(*varied: Tensor) -> Tensor:
            whole = list(given)
            for k, value in zip(chosen, varied, strict=True):
                whole[k] = value
            end: Tensor = self.step(*whole)
            return end

        _, pull = torch.func.vjp(step, *(given[k] for k in chosen))  # type: ignore[misc]  # without has_aux: two
        products: Tensors = pull(a)
        return products

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, **_lowering(self._options, self._examples[1])) if self._whole else function

    def _loop(self, more: Callable[..., Tensor], body: Callable[..., Tensors], carried: Tensors) -> Tensors:
        if self._whole:
            result: Tensors = torch.while_loop(more, body, carried)  # type: ignore[no-untyped-call]
            return result
        while more(*carried):
            carried = body(*carried)
        return carried

    def _forward(
        self, x: Tensor, clock: Tensor, states: Tensor | None, tables: Tensors, fixed: Tensors
    ) -> tuple[Tensor, None]:
        """Return first and last state; write each state to the row of ``states`` with its number, if rows are given."""

        def one(n: Tensor, x: Tensor) -> Tensors:
            x = self._fast(n, x, clock, *_rows(tables, n), *fixed).contiguous()
            if states is not None:
                states.index_copy_(0, (n + 1).view(1), x.unsqueeze(0))
            return n + 1, x

        def several(n: Tensor, x: Tensor) -> Tensors:
            for _ in range(self._together):
                n, x = one(n, x)
            return n, x

        carried: Tensors = (torch.zeros((), dtype=torch.int64, device=x.device), x)
        if self._together > 1:
            carried = self._loop(lambda n, x: n + self._together <= clock[3], several, carried)
        return torch.stack([x, self._loop(lambda n, x: n < clock[3], one, carried)[1]]), None

    def _reverse(
        self,
        pull: Callable[..., Tensors],
        together: int,
        nodes: Tensor,
        clock: Tensor,
        states: Tensor,
        tables: Tensors,
        fixed: Tensors,
        sums: Tensors,
    ) -> Tensors:
        """Add to each row of ``nodes`` the pull-back of the next one.

        Returns:
            The first row, and ``sums`` plus the pull-backs by lifted tensors. A loop without a result would be dropped,
            in spite of what it writes.
        """

        def one(n: Tensor, a: Tensor, *sums: Tensor) -> Tensors:
            m = n - 1
            inputs = (m, _row(states, m), clock, *_rows(tables, m))
            first, *parts = pull(*inputs, *fixed[:lifted], a, *fixed[lifted:])
            a = (_row(nodes, m) + first).contiguous()
            nodes.index_copy_(0, m.view(1), a.unsqueeze(0))
            return m, a, *(total + part for total, part in zip(sums, parts, strict=True))

        def several(n: Tensor, *carried: Tensor) -> Tensors:
            for _ in range(together):
                n, *carried = one(n, *carried)  # type: ignore[assignment]
            return n, *carried

        lifted = len(self._examples) - self._own
        n = clock[3].to(torch.int64)
        start = (n, _row(nodes, n).clone(), *sums)
        if together > 1:
            start = self._loop(lambda n, *_: n >= together, several, start)
        return self._loop(lambda n, *_: n > 0, one, start)[1:]


def _steps_of_an_iteration(graph: torch.fx.GraphModule) -> int:
    return max(1, min(8, OPERATIONS // len(graph.graph.nodes)))


def _hoisted(graph: torch.fx.GraphModule, varying: Sequence[int]) -> tuple[Invariants, torch.fx.GraphModule]:
    """Move what is the same for every step out of ``graph``, such as exp(dt A).

    Args:
        graph: of plain operations.
        varying: the numbers of the inputs that differ from step to step.

    Returns:
        A function of the other inputs, and a graph that takes its results as further inputs at the end.
    """
    nodes = list(graph.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    fixed = {node for k, node in enumerate(inputs) if k not in varying}
    for node in nodes:
        if node.op in ("get_attr", "call_function") and fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
    # Views and numbers of the clock cost nothing, so they stay; of the others, those that the steps need are moved.
    moved: dict[torch.fx.Node, None] = {}
    needed = [source for node in nodes if node not in fixed for source in node.all_input_nodes if source in fixed]
    while needed:
        node = needed.pop()
        if node.all_input_nodes and _has_entries(node) and not getattr(node.target, "is_view", False):
            moved[node] = None
        else:
            needed += node.all_input_nodes
    # A value that is the same at first may be written to.
    if not moved or any(_writes(node) and fixed.intersection(node.args[:1]) for node in nodes):
        return _nothing, graph
    before, once = torch.fx.Graph(), torch.fx.Graph()
    early: dict[torch.fx.Node, torch.fx.Node] = {}
    late = {node: once.placeholder(node.name) for node in (*inputs, *moved)}
    for node in nodes:
        if node in fixed:
            early[node] = before.node_copy(node, early.__getitem__)
        if node not in late:
            late[node] = once.node_copy(node, late.__getitem__)
    before.output(tuple(early[node] for node in moved))
    for node, copied in late.items():
        copied.meta = dict(node.meta)
    for part in (before, once):
        part.eliminate_dead_code()
    return torch.fx.GraphModule(graph, before), torch.fx.GraphModule(graph, once)


def _nothing(*_: Tensor) -> Tensors:
    return ()


def _writes(node: torch.fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _has_entries(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 0


def _flat(function: Callable[..., Any], examples: Tensors) -> torch.fx.GraphModule:
    """Return ``function`` as a graph of plain operations, without derivatives, modules and writes in place."""
    from torch.fx.experimental.proxy_tensor import make_fx  # brings sympy

    # Derivatives first: inside of functionalize, torch 2.14 cannot take an element of a tensor that torch.func follows
    # ("wrapper == nullptr INTERNAL ASSERT FAILED"), and leaves the process without saved-tensor hooks.
    with torch.no_grad():
        flat = make_fx(function, tracing_mode="fake")(*examples)
        return make_fx(torch.func.functionalize(flat), tracing_mode="fake")(*examples)


def _lowering(options: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """Return the arguments of torch.compile for loops over states like ``x``: our defaults and the user's."""
    if options.keys() & {"backend", "mode"}:
        return {**_OWN_GRAPHS, **options}
    # With torch.stack and torch.cat as pointwise operations, several steps of a small state become one kernel.
    ours = {"cpp_wrapper": True, "force_pointwise_cat": x.numel() <= SMALL}
    return {**_OWN_GRAPHS, **options, "options": {**ours, **options.get("options", {})}}


def _why_not(device: torch.device, options: dict[str, Any]) -> str | None:
    """Return the reason why a loop cannot be compiled, if there is one."""
    if options.get("backend", "inductor") != "inductor":
        return None
    if device.type != "cpu":
        return f"the loop operator waits for the device {str(device)!r} in every step"
    name = compiler()
    return None if shutil.which(name) else f"the C++ compiler {name!r} was not found (set CXX to the path of one)"


def _row(table: Tensor, n: Tensor) -> Tensor:
    return table.index_select(0, n.view(1)).squeeze(0)


def _rows(tables: Tensors, n: Tensor) -> Tensors:
    return tuple(_row(table, number) for table in tables for number in (n, n + 1))


def _by_rows(table: Tensor) -> Tensor:
    """Return ``table`` marked as one whose number of rows must not ask for another graph."""
    torch._dynamo.mark_dynamic(table, 0)
    return table


def _apart(tensors: Tensors) -> Tensors:
    """Return ``tensors`` without their graphs; those that share memory are copied, which a loop operator needs."""
    seen: set[int] = set()
    found = []
    for tensor in tensors:
        place = tensor.untyped_storage().data_ptr()
        found.append(tensor.detach().clone() if place in seen else tensor.detach())
        seen.add(place)
    return tuple(found)
