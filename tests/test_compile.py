"""One graph for a step, whatever the number of steps, and the values of `solve`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import odeadv

pytestmark = pytest.mark.filterwarnings("ignore::odeadv.AccuracyWarning")
X0 = torch.linspace(-1, 1, 6, dtype=torch.float64)


class CountingBackend:
    def __init__(self) -> None:
        self.graphs: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs.append(len(graph.graph.nodes))
        return graph.forward


def field() -> odeadv.SplitField:
    return odeadv.SplitField(
        a=lambda t, x: torch.sin(t) * torch.tanh(x),
        b=odeadv.Operator(lambda t, x: -x, flow=lambda t, dt, x: x * torch.exp(-dt)),
    )


@pytest.mark.parametrize("scheme", ["lie", "strang", "strang-symmetric", "blanes-moan4", "extrapolated-strang4"])
@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)])
def test_a_step_is_one_graph_and_its_values_are_those_of_solve(scheme, span):
    torch._dynamo.reset()
    backend = CountingBackend()
    substep = {"a": "rk4", "b": "exact"}
    solver = odeadv.compile_solver(field(), dt=0.05, scheme=scheme, substep=substep, backend=backend)
    for end, steps in ((span[1], 20), (span[0] + 4 * (span[1] - span[0]), 80)):
        expected = odeadv.solve(field(), X0, (span[0], end), scheme=scheme, dt=0.05, substep=substep)
        sol = solver(X0, (span[0], end))
        assert torch.allclose(sol.xs[-1], expected.xs[-1], rtol=1e-12, atol=1e-13)
        assert sol.stats.steps == steps
    assert len(backend.graphs) == 1


def test_gradients_pass_through_the_compiled_steps():
    torch._dynamo.reset()
    solver = odeadv.compile_solver(field(), dt=0.1, substep="rk4", backend="aot_eager")
    x0 = X0.clone().requires_grad_()
    (compiled,) = torch.autograd.grad(solver(x0, (0.0, 1.0)).xs[-1].sum(), x0)
    (eager,) = torch.autograd.grad(odeadv.solve(field(), x0, (0.0, 1.0), dt=0.1, substep="rk4").xs[-1].sum(), x0)
    assert torch.allclose(compiled, eager, rtol=1e-12)


def test_many_solvers_and_many_kinds_of_state():
    torch._dynamo.reset()
    for k in range(10):
        solver = odeadv.compile_solver(lambda t, x, k=k: -0.1 * k * x, dt=0.5, backend="eager")
        expected = X0 * (1 - 0.05 * k + 0.5 * (0.05 * k) ** 2) ** 2  # two midpoint steps
        assert torch.allclose(solver(X0, (0.0, 1.0)).xs[-1], expected)
    solver = odeadv.compile_solver(lambda t, x: torch.sin(t) * x, dt=0.5, backend="eager")
    for x0 in (X0, X0[:3], X0.float(), X0.to(torch.complex64), X0.reshape(2, 3), X0.reshape(1, 2, 3)):
        for asked in (False, True):
            start = x0.clone().requires_grad_(asked)
            expected = odeadv.solve(lambda t, x: torch.sin(t) * x, start, (0.0, 1.0), dt=0.5).xs[-1]
            assert torch.allclose(solver(start, (0.0, 1.0)).xs[-1], expected)


def test_fields_within_fields_compile():
    torch._dynamo.reset()
    inner = odeadv.SplitField(p=lambda t, x: -0.1 * x, q=lambda t, x: 0.2 * x)
    nested = odeadv.SplitField(pair=inner, other=lambda t, x: torch.sin(x))
    for field, arguments in (
        (inner, {"scheme": "rk4"}),
        (nested, {"substep": {"pair": odeadv.Nested("strang"), "other": "midpoint"}}),
        (nested, {"substep": "midpoint"}),
    ):
        compiled = odeadv.compile_solver(field, dt=0.25, backend="eager", **arguments)(X0, (0.0, 1.0))
        eager = odeadv.solve(field, X0, (0.0, 1.0), dt=0.25, **arguments)
        assert torch.allclose(compiled.xs[-1], eager.xs[-1], rtol=1e-12)


def test_what_cannot_be_compiled_is_said():
    adversarial = odeadv.AdversarialField(lambda t, x: -x, lambda x: (x**2).sum(), eta=0.1)
    with pytest.raises(ValueError, match=r"^field: an AdversarialField cannot be compiled"):
        odeadv.compile_solver(adversarial, dt=0.1)
    from odeadv.fields import Piecewise

    pieces = Piecewise([odeadv.Operator(lambda t, x: x)], (0.0, 1.0))
    with pytest.raises(ValueError, match=r"^field: a piecewise field"):
        odeadv.compile_solver(pieces, dt=0.1)
    with pytest.raises(ValueError, match=r"^dt: got 0"):
        odeadv.compile_solver(lambda t, x: -x, dt=0.0)
    with pytest.raises(ValueError, match=r"^substep: torchdiffeq's methods"):
        odeadv.compile_solver(lambda t, x: -x, dt=0.1, substep="torchdiffeq:rk4")
    solver = odeadv.compile_solver(lambda t, x: -x, dt=0.3, backend="eager")
    with pytest.raises(ValueError, match=r"^dt: 0\.3 does not divide"):
        solver(X0, (0.0, 1.0))
    with pytest.raises(odeadv.SolveError, match="NaN or infinite"):
        odeadv.compile_solver(lambda t, x: 1e300 * x**3, dt=0.25, backend="eager")(X0, (0.0, 1.0))


def test_the_rounding_of_a_span_asks_for_no_other_graph():
    backend = CountingBackend()
    solver = odeadv.compile_solver(field(), dt=0.1, substep="midpoint", backend=backend)
    for k in range(20):
        solver(X0, (0.1 * k, 0.1 * k + 0.1))
        solver(X0, (0.0, 0.1 * (k + 1)))
    assert len(backend.graphs) == 1
    assert torch.allclose(
        solver(X0, (0.1, 0.0)).xs[-1], odeadv.solve(field(), X0, (0.1, 0.0), dt=0.1, substep="midpoint").xs[-1]
    )
