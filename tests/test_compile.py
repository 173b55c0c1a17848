"""Whole solves as one call: one graph for any number of steps, and the values and gradients of `solve`.

Most tests run the loops by torch's own interpreter (``backend="eager"``), since code takes ten seconds to compile. The
graphs are the same.
"""

import math
from collections.abc import Callable

import pytest
import torch
from helpers import COMPILES
from torch import Tensor

import odeadv
from odeadv.fields import Piecewise
from odeadv.solver import CompileWarning, _loop

pytestmark = pytest.mark.filterwarnings("ignore::odeadv.AccuracyWarning")
compiles = pytest.mark.skipif(not COMPILES, reason="compile_solver needs torch 2.13")
X0 = torch.linspace(-1, 1, 6, dtype=torch.float64)
MATRIX = 0.3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class CountingBackend:
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs += 1
        return graph.forward


def split(matrix: Tensor = MATRIX) -> odeadv.SplitField:
    return odeadv.SplitField(
        a=lambda t, x: torch.sin(t) * torch.tanh(matrix @ x),
        b=odeadv.Operator(lambda t, x: -x, flow=lambda t, dt, x: x * torch.exp(-dt)),
    )


def adversarial(matrix: Tensor, eta: float | Tensor = 0.1) -> odeadv.AdversarialField:
    return odeadv.AdversarialField(lambda t, x: torch.cos(t) * torch.tanh(matrix @ x), lambda x: (x**2).sum(), eta)


def assert_equals_solve(
    field: odeadv.VectorField, choices: dict, call: dict, learned: list[Tensor], **options: object
) -> None:
    """Check that a compiled solve has the states, costates and gradients of `solve`."""
    x0 = X0.clone().requires_grad_()
    found = odeadv.compile_solver(field, **choices, **options)(x0, (0.0, 1.0), **call)
    expected = odeadv.solve(field, x0, (0.0, 1.0), **choices, **call)
    assert torch.equal(found.ts, expected.ts)
    assert torch.allclose(found.xs, expected.xs, rtol=1e-12, atol=1e-13)
    if expected.loss is not None:
        assert torch.allclose(found.loss, expected.loss, rtol=1e-12)
        pairs = zip(found.costate.nodes, expected.costate.nodes, strict=True)
        assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in pairs)
    weights = torch.randn(expected.xs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad((sol.xs * weights).sum(), [x0, *learned]) for sol in (found, expected)]
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(*gradients, strict=True))


@pytest.fixture(autouse=True)
def _short_iterations(monkeypatch):
    monkeypatch.setattr(_loop, "OPERATIONS", 100)


@compiles
class TestValues:
    def test_code_has_the_values_and_gradients_of_solve(self):
        matrix = MATRIX.clone().requires_grad_()
        solver = odeadv.compile_solver(lambda t, x: torch.cos(t) * (matrix @ x), scheme="midpoint")
        x0 = X0.clone().requires_grad_()
        for span, steps in (((0.0, 1.0), 1), ((0.0, 2.0), 7), ((1.0, -1.0), 8)):
            found = solver(x0, span, steps=steps)
            expected = odeadv.solve(solver.field, x0, span, scheme="midpoint", steps=steps)
            assert torch.allclose(found.xs, expected.xs, rtol=1e-13, atol=1e-14)
            gradients = [torch.autograd.grad(sol.xs.square().sum(), (x0, matrix)) for sol in (found, expected)]
            assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(*gradients, strict=True))

    def test_merged_flows_with_gradients(self):
        matrix = MATRIX.clone().requires_grad_()
        choices = {"scheme": "strang", "substep": {"a": "midpoint", "b": "exact"}}
        assert_equals_solve(split(matrix), choices, {"dt": 0.2}, [matrix], backend="eager")

    def test_saved_steps_and_weighted_tables_with_gradients(self):
        matrix = MATRIX.clone().requires_grad_()
        choices = {"scheme": "averaged-strang", "substep": "euler"}
        assert_equals_solve(split(matrix), choices, {"steps": 5, "save_at": [0.0, 0.4, 1.0]}, [matrix], backend="eager")

    def test_adversarial_sweeps_with_gradients(self):
        matrix, eta = MATRIX.clone().requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        choices = {"scheme": "strang-symmetric", "costate": "hermite", "sweeps": 2}
        assert_equals_solve(
            adversarial(matrix, eta), choices, {"dt": 0.25, "save_at": "steps"}, [matrix, eta], backend="eager"
        )

    def test_exponentials_of_matrices_are_computed_before_the_loop(self):
        matrix = MATRIX.clone().requires_grad_()
        field = odeadv.SplitField(
            a=lambda t, x: torch.sin(t) * torch.tanh(2.0 * matrix[:, 0] - x), b=odeadv.Operator.linear(matrix)
        )
        choices = {"scheme": "strang", "substep": {"a": "midpoint", "b": "exact"}}
        assert_equals_solve(field, choices, {"dt": 0.25, "save_at": "steps"}, [matrix], backend="eager")
        solver = odeadv.compile_solver(field, **choices, backend="eager")
        solver(X0, (0.0, 1.0), dt=0.25)
        (steps,) = solver._compiled.values()
        loops, exponential = steps._bound.loops, torch.ops.aten.linalg_matrix_exp.default
        parts = (loops.step, loops.before, loops._fast)
        assert [exponential in {node.target for node in part.graph.nodes} for part in parts] == [True, True, False]

    def test_second_derivatives(self):
        x0 = X0.clone().requires_grad_()
        solver = odeadv.compile_solver(lambda t, x: torch.sin(x), dt=0.25, backend="eager")
        products = []
        for sol in (solver(x0, (0.0, 1.0)), odeadv.solve(solver.field, x0, (0.0, 1.0), dt=0.25)):
            (first,) = torch.autograd.grad(sol.xs[-1].sum(), x0, create_graph=True)
            products.append(torch.autograd.grad((first**2).sum(), x0)[0])
        assert torch.allclose(*products, rtol=1e-12)


@compiles
class TestCompilation:
    def test_steps_spans_and_rounding_ask_for_no_other_graph(self):
        backend = CountingBackend()
        solver = odeadv.compile_solver(split(), dt=0.1, scheme="lie", substep="euler", backend=backend)
        for k in range(5):
            solver(X0, (0.1 * k, 0.1 * k + 0.1))
            solver(X0, (0.0, 0.1 * (k + 1)))
            solver(X0, (1.0, 0.0), steps=5 + k, dt=None)
        assert backend.graphs == 1

    def test_what_a_field_closes_over_may_change(self):
        module = torch.nn.Linear(6, 6, bias=False).double()
        solver = odeadv.compile_solver(lambda t, x: module(x), dt=0.5, substep="euler", backend="eager")
        for weight in (MATRIX, -MATRIX):
            module.weight = torch.nn.Parameter(weight)
            expected = X0 + 0.5 * X0 @ weight.T
            assert torch.allclose(solver(X0, (0.0, 0.5)).xs[-1], expected)

    def test_kinds_of_states_and_tensors_that_share_memory(self):
        pair = torch.stack([MATRIX, MATRIX])
        field = odeadv.VectorField({"f": lambda t, x: torch.sin(t) * (pair[0] @ x.to(pair.dtype) - x).to(x.dtype)})
        solver = odeadv.compile_solver(field, dt=0.5, backend="eager")
        for x0 in (X0, X0.float(), X0.bfloat16(), X0.reshape(6, 1)):
            expected = odeadv.solve(field, x0, (0.0, 1.0), dt=0.5).xs
            found = solver(x0, (0.0, 1.0)).xs
            assert found.dtype == x0.dtype
            assert torch.allclose(found, expected, rtol=1e-6)

    def test_without_a_compiler_the_loop_stays_in_python(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        matrix = MATRIX.clone().requires_grad_()
        with pytest.warns(CompileWarning, match="the C\\+\\+ compiler 'no-such-compiler' was not found"):
            assert_equals_solve(adversarial(matrix), {"scheme": "strang"}, {"dt": 0.25}, [matrix])

    def test_a_loop_operator_still_has_its_restrictions(self):
        """Show why `_loop` counts by tensors and copies inputs that share memory. If this fails, it need not."""
        torch._dynamo.reset()
        pair = torch.ones(2)

        def loop(a: Tensor, b: Tensor) -> Tensor:
            return torch.while_loop(lambda x: x.sum() < 5, lambda x: (x + a + b,), (torch.zeros(1),))[0]

        with pytest.raises(Exception, match="aliasing"):
            torch.compile(lambda: loop(pair[0], pair[1]), backend="eager", fullgraph=True)()


@compiles
class TestRepeatedCalls:
    """Calls with the arguments of the latest call skip the checks of these arguments."""

    def test_have_their_own_states_and_times(self):
        solver = odeadv.compile_solver(lambda t, x: -x, substep="euler", backend="eager")
        for x0 in (X0, 2 * X0):
            sol = solver(x0, (0.0, 1.0), steps=2)
            assert torch.allclose(sol.xs, torch.stack([x0, 0.25 * x0]))
            assert sol.ts.tolist() == [0.0, 1.0]
            sol.ts.zero_()  # a user's write, which the next call must not see
        assert solver(X0, (0.0, 1.0), steps=2, save_at="steps").xs.shape == (3, 6)

    def test_are_checked_for_what_may_differ(self):
        solver = odeadv.compile_solver(lambda t, x: -x, substep="euler", backend="eager")
        solver(X0, (0.0, 1.0), steps=2)
        with pytest.raises(ValueError, match=r"^x0: contains NaN"):
            solver(math.nan * X0, (0.0, 1.0), steps=2)
        with pytest.raises(TypeError, match=r"^x0: got list"):
            solver(X0.tolist(), (0.0, 1.0), steps=2)
        with pytest.raises(TypeError, match=r"^steps: "):
            solver(X0, (0.0, 1.0), steps=2.0)


class TestMessages:
    def test_of_fields_and_choices(self):
        with pytest.raises(ValueError, match=r"^field: a piecewise field"):
            odeadv.compile_solver(Piecewise([odeadv.Operator(lambda t, x: x)], (0.0, 1.0)))
        with pytest.raises(ValueError, match=r"^field: got an AdversarialField with a transform"):
            odeadv.compile_solver(adversarial(MATRIX).transformed(list))
        with pytest.raises(ValueError, match=r"^substep: torchdiffeq's methods"):
            odeadv.compile_solver(lambda t, x: -x, substep="torchdiffeq:rk4")
        with pytest.raises(TypeError, match="sweeps"):
            odeadv.compile_solver(adversarial(MATRIX), sweeps="converge")
        with pytest.raises(ValueError, match=r"^dt: got 'adaptive'"):
            odeadv.compile_solver(lambda t, x: -x, dt="adaptive")

    @compiles
    def test_of_calls(self):
        solver = odeadv.compile_solver(lambda t, x: -x, dt=0.3, backend="eager")
        with pytest.raises(ValueError, match=r"^dt: 0\.3 does not divide"):
            solver(X0, (0.0, 1.0))
        with pytest.raises(ValueError, match=r"^dt: got adaptive or uneven"):
            solver(X0, (0.0, 1.0), dt="adaptive")
        with pytest.raises(ValueError, match=r"^save_at: got 0.1, which is not the end of a step"):
            solver(X0, (0.0, 0.9), save_at=[0.1])
        with pytest.raises(ValueError, match=r"^field: draws random numbers"):
            odeadv.compile_solver(lambda t, x: torch.rand_like(x))(X0, (0.0, 1.0), steps=2)
        with pytest.raises(odeadv.SolveError, match="NaN or infinite"):
            odeadv.compile_solver(lambda t, x: math.inf * x, dt=0.5, backend="eager")(X0, (0.0, 1.0))


def test_an_older_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, *, fullgraph=False, backend="inductor": model)
    with pytest.raises(ValueError, match=r"^torch: got version .*, expected 2\.13 or newer"):
        odeadv.compile_solver(lambda t, x: -x)(X0, (0.0, 1.0), steps=2)


def test_complex_states_are_refused_before_work():
    solver = odeadv.compile_solver(lambda t, x: 1j * x)
    with pytest.raises(TypeError, match=r"^x0: got torch\.complex64, expected a real dtype"):
        solver(torch.ones(2, dtype=torch.complex64), (0.0, 1.0), steps=2)
