"""Whole solves as one call: one graph for any number of steps, and the values and gradients of `solve`.

The loops of small states are plain C++, those of others are compiled by Inductor. Inductor takes ten seconds, so the
tests here run its loops by torch's own interpreter (``backend="eager"``). The graphs are the same.
`test_compile_inductor.py` has the test of Inductor.
"""

import math
from collections.abc import Callable

import pytest
import torch
from helpers import COMPILES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import odeadv
from odeadv.fields import Piecewise
from odeadv.solver import CompiledSolver, CompileWarning, _loop, _scalars

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
) -> CompiledSolver:
    """Check that a compiled solve has the states, costates and gradients of `solve`; return the compiled solver."""
    x0 = X0.clone().requires_grad_()
    solver = odeadv.compile_solver(field, **choices, **options)
    found = solver(x0, (0.0, 1.0), **call)
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
    return solver


def check_values_and_gradients(**lowering: object) -> None:
    """Check a compiled solve over several spans, forward and backward."""
    matrix = MATRIX.clone().requires_grad_()
    solver = odeadv.compile_solver(lambda t, x: torch.cos(t) * (matrix @ x), scheme="midpoint", **lowering)
    x0 = X0.clone().requires_grad_()
    for span, steps in (((0.0, 1.0), 1), ((0.0, 2.0), 7), ((1.0, -1.0), 8)):
        found = solver(x0, span, steps=steps)
        expected = odeadv.solve(solver.field, x0, span, scheme="midpoint", steps=steps)
        assert torch.allclose(found.xs, expected.xs, rtol=1e-13, atol=1e-14)
        gradients = [torch.autograd.grad(sol.xs.square().sum(), (x0, matrix)) for sol in (found, expected)]
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(*gradients, strict=True))


@pytest.fixture(autouse=True)
def _short_iterations(monkeypatch):
    monkeypatch.setattr(_loop, "OPERATIONS", 100)


@pytest.fixture(params=[{}, {"backend": "eager"}], ids=["C++", "interpreter"])
def options(request: pytest.FixtureRequest) -> dict:
    return request.param


@compiles
class TestValues:
    def test_code_has_the_values_and_gradients_of_solve(self):
        check_values_and_gradients()

    def test_merged_flows_with_gradients(self, options):
        matrix = MATRIX.clone().requires_grad_()
        choices = {"scheme": "strang", "substep": {"a": "midpoint", "b": "exact"}}
        assert_equals_solve(split(matrix), choices, {"dt": 0.2}, [matrix], **options)

    def test_saved_steps_and_weighted_tables_with_gradients(self, options):
        matrix = MATRIX.clone().requires_grad_()
        choices = {"scheme": "averaged-strang", "substep": "euler"}
        assert_equals_solve(split(matrix), choices, {"steps": 5, "save_at": [0.0, 0.4, 1.0]}, [matrix], **options)

    def test_adversarial_sweeps_with_gradients(self, options):
        matrix, eta = MATRIX.clone().requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        choices = {"scheme": "strang-symmetric", "costate": "hermite", "sweeps": 2}
        assert_equals_solve(
            adversarial(matrix, eta), choices, {"dt": 0.25, "save_at": "steps"}, [matrix, eta], **options
        )

    def test_slopes_of_a_costate_for_f_by_elements(self, options):
        rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        field = odeadv.AdversarialField(
            lambda t, x: torch.cat([torch.stack([x[1], x[0] - x[0] ** 3 - rate * x[1]]), torch.cos(t) * x[2:]]),
            lambda x: (x**2).sum(),
            eta=0.1,
        )
        assert_equals_solve(field, {"scheme": "rk4", "costate": "hermite"}, {"steps": 3}, [rate], **options)
        checkpoint(lambda x: 2.0 * x, rate, use_reentrant=False).backward()  # torch.func has left no state behind

    def test_exponentials_of_matrices_are_computed_before_the_loop(self):
        matrix = MATRIX.clone().requires_grad_()
        field = odeadv.SplitField(
            a=lambda t, x: torch.sin(t) * torch.tanh(2.0 * matrix[:, 0] - x), b=odeadv.Operator.linear(matrix)
        )
        choices = {"scheme": "strang", "substep": {"a": "midpoint", "b": "exact"}}
        solver = assert_equals_solve(field, choices, {"dt": 0.25, "save_at": "steps"}, [matrix], backend="eager")
        (steps,) = solver._compiled.values()
        loops, exponential = steps._bound.loops, torch.ops.aten.linalg_matrix_exp.default
        parts = (loops.step, loops.before, loops._fast)
        assert [exponential in {node.target for node in part.graph.nodes} for part in parts] == [True, True, False]
        with torch.no_grad():  # code of our own takes the exponential as an input
            found = odeadv.compile_solver(field, **choices)(X0, (0.0, 1.0), dt=0.25)
            assert torch.allclose(found.xs, odeadv.solve(field, X0, (0.0, 1.0), **choices, dt=0.25).xs, rtol=1e-12)

    @pytest.mark.parametrize("part", [0, 1])
    def test_every_operation_in_code(self, part, monkeypatch):
        """Write each operation that `_scalars` knows, on elements of both signs, with its derivative."""
        monkeypatch.setattr(_loop._Loops, "_compiled", None)  # what Inductor would be called by
        weights = torch.linspace(0.2, 1.4, 6, dtype=torch.float64).requires_grad_()

        def f(t: Tensor, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            y, z = x * weights, 1.0 + x * x
            found = [name(y) for name in (torch.cos, torch.sin, torch.tan, torch.sinh, torch.tanh, torch.exp)]
            found += [torch.expm1(y), torch.sqrt(z), torch.log(z), torch.log1p(z), torch.log2(z), torch.erf(y)]
            found += [torch.abs(y), torch.asin(0.3 * y), torch.acos(0.3 * y), torch.atan(y), torch.acosh(z + 1.0)]
            found += [
                torch.asinh(y),
                torch.atanh(0.3 * y),
                torch.cosh(y),
                torch.floor(y) + torch.ceil(y),
                torch.sign(y),
            ]
            found += [torch.atan2(y, z), y / z, torch.maximum(y, x), torch.minimum(y, t), -y, z**y, z**-0.3, 2.0**y]
            found += [y**k for k in (0, 1, 2, 3, 4)] + [z**0.5, z**-1, 1.0 / z, torch.relu(y), torch.rsqrt(z)]
            found += [torch.sigmoid(y), torch.square(y), torch.add(y, z, alpha=2.0), torch.sub(y, z, alpha=-3.0)]
            found += [torch.rsub(y, 1.0), torch.where((y > 0.1) & (x <= 0.9), y, z), torch.where(x != y, t, 0.5)]
            found += [y.flip(0), torch.roll(y, 2), torch.cat([y[3:], x[:3]]), torch.stack([y[0], x[1]]).repeat(3)]
            found += [torch.outer(y, x).sum(0), torch.outer(y, x).mean(1), y.sum() * x, torch.dot(x, y) * y]
            found += [torch.outer(x, y) @ x, (torch.outer(x, y) @ MATRIX)[2]]
            found += [(y.reshape(2, 3).T @ y.reshape(2, 3)).diagonal().repeat(2)]
            found += [y.reshape(2, 3).sum(0, keepdim=True).expand(2, 3).reshape(6), y.unbind()[4] * x]
            return 0.01 * sum(found[part::2])

        assert_equals_solve(odeadv.VectorField({"f": f}), {"substep": "euler"}, {"steps": 2}, [weights])

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

    def test_kinds_of_states_and_tensors_that_share_memory(self, options):
        pair = torch.stack([MATRIX, MATRIX])
        field = odeadv.VectorField({"f": lambda t, x: torch.sin(t) * (pair[0] @ x.to(pair.dtype) - x).to(x.dtype)})
        solver = odeadv.compile_solver(field, dt=0.5, **options)
        narrow = [X0.bfloat16()] if options else []  # which Inductor rounds less often than `solve`
        for x0 in (X0, X0.float(), X0.reshape(6, 1), *narrow):
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
class TestStatic:
    def test_new_values_are_seen_and_new_tensors_are_not(self, options):
        module = torch.nn.Linear(6, 6, bias=False).double()
        solver = odeadv.compile_solver(lambda t, x: module(x), substep="euler", static=True, **options)
        x0, learned = X0.clone().requires_grad_(), module.weight
        for weight in (MATRIX.T.clone().requires_grad_(), MATRIX.clone().requires_grad_()):
            with torch.no_grad():
                module.weight.copy_(weight)
            found, expected = solver(x0, (0.0, 0.5), steps=1).xs[-1], x0 + 0.5 * x0 @ weight.T
            assert torch.allclose(found, expected)
            gradients = (
                torch.autograd.grad(found.sum(), [x0, learned]),
                torch.autograd.grad(expected.sum(), [x0, weight]),
            )
            assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
        module.weight = torch.nn.Parameter(-MATRIX)
        assert torch.allclose(solver(x0, (0.0, 0.5), steps=1).xs[-1], x0 + 0.5 * x0 @ MATRIX.T)

    def test_other_spans_and_states(self):
        field = adversarial(MATRIX)
        solver = odeadv.compile_solver(field, scheme="strang", static=True)
        for x0, span, steps in ((X0, (0.0, 1.0), 4), (-X0, (1.0, 0.0), 3), (X0.reshape(6, 1), (0.0, 1.0), 4)):
            found = solver(x0, span, steps=steps)
            expected = odeadv.solve(field, x0, span, scheme="strang", steps=steps)
            assert torch.allclose(found.xs, expected.xs, rtol=1e-12)
            assert torch.allclose(found.loss, expected.loss)


@compiles
class TestRepeatedCalls:
    """Calls with the arguments of the latest call skip the checks of these arguments."""

    def test_have_their_own_states_and_times(self, options):
        solver = odeadv.compile_solver(lambda t, x: -x, substep="euler", **options)
        for x0 in (X0, 2 * X0):
            sol = solver(x0, (0.0, 1.0), steps=2)
            assert torch.allclose(sol.xs, torch.stack([x0, 0.25 * x0]))
            assert sol.ts.tolist() == [0.0, 1.0]
            sol.ts.zero_()  # a user's write, which the next call must not see
        assert solver(X0, (0.0, 1.0), steps=2, save_at="steps").xs.shape == (3, 6)

    def test_are_checked_for_what_may_differ(self, options):
        solver = odeadv.compile_solver(lambda t, x: -x, substep="euler", **options)
        solver(X0, (0.0, 1.0), steps=2)
        with pytest.raises(ValueError, match=r"^x0: contains NaN"):
            solver(math.nan * X0, (0.0, 1.0), steps=2)
        with pytest.raises(TypeError, match=r"^x0: got list"):
            solver(X0.tolist(), (0.0, 1.0), steps=2)
        with pytest.raises(TypeError, match=r"^steps: "):
            solver(X0, (0.0, 1.0), steps=2.0)


@compiles
class TestCode:
    """`_scalars` writes what it can, and leaves the rest to Inductor."""

    @staticmethod
    def graph(f: Callable, x: Tensor) -> torch.fx.GraphModule:
        def step(number: Tensor, x: Tensor, clock: Tensor) -> Tensor:
            return x + clock[2] * f(x)

        zero = torch.zeros((), dtype=torch.int64)
        return _loop._flat(step, (zero, x, torch.zeros(4, dtype=torch.float64)))

    def test_a_step_is_written(self):
        run = _scalars.forward_loop(self.graph(torch.cos, X0), 0)
        states = torch.zeros(3, 6, dtype=torch.float64)
        ends, finite = run(X0, torch.tensor([0.0, 1.0, 0.5, 2.0], dtype=torch.float64), states, (), ())
        middle = X0 + 0.5 * torch.cos(X0)
        assert torch.equal(ends, states[[0, 2]] + torch.stack([X0, torch.zeros_like(X0)]))
        assert torch.allclose(states[1:], torch.stack([middle, middle + 0.5 * torch.cos(middle)]), rtol=1e-15)
        assert finite
        assert not run(math.inf * X0, torch.ones(4, dtype=torch.float64), None, (), ())[1]

    def test_other_graphs_are_not(self, monkeypatch):
        assert _scalars.forward_loop(self.graph(torch.cos, torch.zeros(17)), 0) is None
        assert _scalars.forward_loop(self.graph(torch.cos, X0.to(torch.complex128)), 0) is None
        assert _scalars.forward_loop(self.graph(torch.special.i0, X0), 0) is None
        assert _scalars.forward_loop(self.graph(lambda x: x.view(torch.int64) * 1.0, X0), 0) is None
        with monkeypatch.context() as patch:
            patch.setattr(_scalars, "ASSIGNMENTS", 20)
            assert _scalars.forward_loop(self.graph(torch.cos, X0), 0) is None
        monkeypatch.setattr(_scalars, "_FLAGS", ("-no-such-flag",))
        assert _scalars.forward_loop(self.graph(torch.cos, X0), 0) is None


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
