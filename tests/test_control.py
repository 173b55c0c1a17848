"""Learning and control: eta as a tensor, running costs and losses at several times, spans with gradients."""

import math
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import odeadv

G = torch.Generator().manual_seed(0)
A = torch.randn(3, 3, dtype=torch.float64, generator=G)
BATCH = torch.randn(4, 3, dtype=torch.float64, generator=G)


def f(t: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ A) * torch.cos(t)


def squared(x: Tensor) -> Tensor:
    return (x**2).sum()


# ---- eta as a tensor ----

VARIANTS = [
    {},
    {"scheme": "strang-midpoint"},
    {"scheme": "rk4", "costate": "hermite"},
    {"sweeps": 2, "differentiate_costate": True},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_by_eta_are_those_of_finite_differences(options):
    def loss(eta: float | Tensor) -> Tensor:
        field = odeadv.AdversarialField(f, squared, eta)
        return odeadv.solve(field, BATCH, (0.0, 1.0), steps=3, **options).loss

    number = loss(0.3)
    for shape in ((), (4,), (1, 3)):
        eta = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
        assert torch.allclose(loss(eta), number, rtol=1e-12)
        assert torch.autograd.gradcheck(loss, (eta,))
    assert torch.func.grad(loss)(torch.tensor(0.3, dtype=torch.float64)) > 0.0


def test_each_sample_has_its_eta():
    etas = [0.0, 0.1, 0.2, 0.5]
    together = odeadv.solve(odeadv.AdversarialField(f, squared, torch.tensor(etas)), BATCH, (0.0, 1.0), steps=3)
    assert together.xs.dtype == torch.float64
    for n, eta in enumerate(etas):
        alone = odeadv.solve(odeadv.AdversarialField(f, squared, eta), BATCH[n : n + 1], (0.0, 1.0), steps=3)
        assert torch.allclose(together.xs[-1, n], alone.xs[-1, 0], rtol=1e-6)  # eta is in float32
    adaptive = odeadv.AdversarialField(f, squared, torch.tensor(etas))
    assert odeadv.solve(adaptive, BATCH, (0.0, 0.2), dt="adaptive", substep="midpoint", rtol=1e-2).xs.shape[1:] == (
        4,
        3,
    )


def test_eta_zero_that_is_learned_has_a_gradient():
    eta = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    odeadv.solve(odeadv.AdversarialField(f, squared, eta), BATCH, (0.0, 1.0), steps=3).loss.backward()
    assert eta.grad > 0.0


@pytest.mark.parametrize(
    ("eta", "error", "message"),
    [
        (
            torch.ones(3),
            ValueError,
            r"^eta: got shape \(3,\) for a state of shape \(4, 3\), expected the sizes of its lead",
        ),
        (torch.ones(4, 3, 1), ValueError, r"^eta: got shape \(4, 3, 1\)"),
        (torch.full((4,), torch.inf), ValueError, r"^eta: contains NaN or infinite values"),
        (torch.ones(4, dtype=torch.int64), TypeError, r"^eta: got a tensor of torch\.int64"),
    ],
)
def test_an_eta_that_does_not_fit(eta, error, message):
    with pytest.raises(error, match=message):
        odeadv.solve(odeadv.AdversarialField(f, squared, eta), BATCH, (0.0, 1.0), steps=3)


def test_diagnostics_take_one_eta():
    def drift(eta: float | Tensor) -> float:
        field = odeadv.AdversarialField(f, squared, eta)
        return odeadv.diagnostics.hamiltonian(field, BATCH, (0.0, 1.0), steps=2).drift

    assert drift(torch.tensor(0.25, requires_grad=True)) == drift(0.25)
    with pytest.raises(ValueError, match=r"^eta: got a tensor of shape \(4,\), expected one number for diagnostics"):
        drift(torch.ones(4))


# ---- running costs, and losses at several times ----


def running(t: Tensor, x: Tensor) -> Tensor:
    return (torch.sin(t) * x**2).sum() + (x**4).sum()


AT = {0.0: lambda x: x.sum(), 0.5: lambda x: (x**3).sum(), 1.0: lambda x: x[0]}
START = BATCH[0]


def posed(eta: float = 0.0, at: dict = AT) -> odeadv.AdversarialField:
    return odeadv.AdversarialField(f, squared, eta, running=running, at=at)


@pytest.mark.parametrize("substep", ["euler", "rk4"])  # trapezoidal rule, Simpson's rule
@pytest.mark.parametrize("options", [{}, {"checkpoints": 3}, {"differentiate_costate": True}])
def test_the_recorded_costate_is_the_gradient_of_the_discrete_cost_to_go(substep, options):
    problem = {"scheme": substep, "steps": 8, **options}
    costate = odeadv.solve(posed(), START, (0.0, 1.0), **problem, costate="hermite").costate
    xs = odeadv.solve(f, START, (0.0, 1.0), scheme=substep, steps=8, save_at="steps").xs
    for n in (0, 4, 6):
        t = n / 8
        later = posed(at={time: loss for time, loss in AT.items() if time >= t})
        x = xs[n].clone().requires_grad_()
        loss = odeadv.solve(later, x, (t, 1.0), scheme=substep, steps=8 - n).loss
        (gradient,) = torch.autograd.grad(loss, x)
        assert torch.allclose(costate.nodes[n], gradient, rtol=1e-12)
    jump = 3 * xs[4] ** 2
    assert torch.allclose(costate.nodes[4] - costate.leaving[4], jump, rtol=1e-12)
    assert torch.equal(costate(0.5), costate.nodes[4])
    assert torch.allclose(costate(0.5 - 1e-6) - costate(0.5 + 1e-6), jump, rtol=1e-3)
    assert torch.allclose(costate.on(0.5, 0.625)(0.5), costate.leaving[4])


def test_the_objective_is_the_integral_and_the_same_in_torch_func():
    t = odeadv.solve(
        odeadv.AdversarialField(lambda t, x: -x, None, 0.0, running=lambda t, x: x[0] ** 2, at={0.5: lambda x: x[0]}),
        torch.ones(1, dtype=torch.float64), (0.0, 1.0), scheme="rk4", steps=64, save_at=[0.3, 0.5],
    )  # fmt: skip
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    assert torch.allclose(t.loss, 0.5 * (1 - e**-2) + e**-0.5, rtol=1e-8)
    assert t.ts.tolist() == [0.3, 0.5]
    assert len(t.xs) == 2

    def loss(x: Tensor) -> Tensor:
        return odeadv.solve(posed(0.1), x, (0.0, 1.0), steps=4, scheme="strang-midpoint").loss

    x = START.clone().requires_grad_()
    assert torch.allclose(torch.func.grad(loss)(START), torch.autograd.grad(loss(x), x)[0], rtol=1e-12)


def test_the_driven_solve_keeps_its_order_with_sources_and_jumps():
    def loss(steps: int, kind: str) -> float:
        return odeadv.solve(posed(0.1), START, (0.0, 1.0), scheme="rk4", steps=steps, costate=kind).loss.item()

    exact = loss(64, "hermite")
    for kind, order in (("linear", 2), ("exact", 3), ("hermite", 4)):
        error = [abs(loss(steps, kind) - exact) for steps in (4, 8)]
        assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.3)
    adaptive = odeadv.solve(posed(0.1, {0.3: squared}), START, (0.0, 1.0), dt="adaptive", rtol=1e-2, substep="midpoint")
    assert adaptive.costate.leaving.keys() == {adaptive.costate.grid.times.index(0.3)}


# ---- linear-quadratic control ----

DYNAMICS = torch.tensor([[0.0, 1.0], [0.5, -0.2]], dtype=torch.float64)
WEIGHT, FINAL, PRICE = torch.diag(torch.tensor([2.0, 0.5])).double(), torch.eye(2).double(), 0.4
X0 = torch.tensor([1.0, -0.5], dtype=torch.float64)


def regulator(at: dict | None = None) -> odeadv.AdversarialField:
    """Return the field that minimises x.FINAL x / 2 + integral of (x.WEIGHT x + PRICE u^2) / 2; u acts on x[1]."""
    eta = torch.tensor([0.0, -1.0 / PRICE])
    return odeadv.AdversarialField(
        lambda t, x: DYNAMICS @ x, lambda x: 0.5 * x @ FINAL @ x, eta, running=lambda t, x: 0.5 * x @ WEIGHT @ x, at=at
    )


def riccati(span: float, at: float | None = None, penalty: float = 0.0) -> tuple[Tensor, Tensor]:
    """x and the costate P x at the end and the beginning of the optimal trajectory, by the Riccati equation."""
    from scipy.integrate import solve_ivp

    a, q = DYNAMICS.numpy(), WEIGHT.numpy()

    def rate(t, p):
        p = p.reshape(2, 2)
        return -(a.T @ p + p @ a - p[:, 1:] @ p[1:] / PRICE + q).reshape(-1)

    def back(t1, t0, p):
        return solve_ivp(rate, (t1, t0), p, rtol=1e-11, atol=1e-12, dense_output=True)

    edges = [0.0, *([at] if at else []), span]
    p, parts = FINAL.numpy().reshape(-1), []
    for t0, t1 in reversed(list(pairwise(edges))):
        parts.insert(0, back(t1, t0, p))
        p = parts[0].y[:, -1] + (penalty * FINAL.numpy().reshape(-1) if t0 == at else 0.0)
    x = X0.numpy()
    for (t0, t1), part in zip(pairwise(edges), parts, strict=True):

        def closed(t, x, part=part):
            gain = part.sol(t).reshape(2, 2)[1] / PRICE
            return a @ x - [0.0, gain @ x]

        x = solve_ivp(closed, (t0, t1), x, rtol=1e-11, atol=1e-12).y[:, -1]
    return torch.from_numpy(x), torch.from_numpy(parts[0].y[:, -1].reshape(2, 2)) @ X0


@pytest.mark.parametrize("at", [None, 0.75])
def test_the_fixed_point_is_the_linear_quadratic_regulator(at):
    penalty = 3.0 if at else 0.0
    field = regulator({at: lambda x: 0.5 * penalty * x @ FINAL @ x} if at else None)
    sol = odeadv.solve(field, X0, (0.0, 1.5), scheme="rk4", costate="hermite", steps=24, sweeps="converge")
    end, first = riccati(1.5, at, penalty)
    assert torch.allclose(sol.xs[-1], end, rtol=1e-5)
    assert torch.allclose(sol.costate.nodes[0], first, rtol=1e-5)
    price = float(0.5 * first @ X0)  # the value function of a linear-quadratic problem
    u = torch.stack([a[1] for a in sol.costate.nodes]) / -PRICE
    assert float(sol.loss + 0.5 * PRICE * torch.trapezoid(u**2, dx=1 / 16)) == pytest.approx(price, rel=0.02)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: odeadv.AdversarialField(f, None, 0.1), TypeError, r"^loss: got NoneType"),
        (lambda: odeadv.AdversarialField(f, None, 0.1, running=3), TypeError, r"^running: got int"),
        (lambda: odeadv.AdversarialField(f, None, 0.1, at=[0.5]), TypeError, r"^at: got list, expected a dict"),
        (lambda: odeadv.AdversarialField(f, None, 0.1, at={0.5: 1}), TypeError, r"^at: got int at 0\.5"),
        (lambda: posed().transformed(list), ValueError, r"^transform: got one for a field with losses at given times"),
        (lambda: odeadv.solve(posed(), START, (0.0, 1.0), steps=5), ValueError, r"^at: got 0\.5, .* are 0\.4 and 0\.6"),
        (lambda: odeadv.solve(posed(), START, (0.0, 0.7), steps=7), ValueError, r"^at: 1 is outside the solved span"),
        (
            lambda: odeadv.solve(
                odeadv.AdversarialField(f, None, 0.1, running=lambda t, x: x), START, (0.0, 1.0), steps=1
            ),
            ValueError,
            r"^running: returned shape \(3,\), expected a scalar",
        ),
        (
            lambda: odeadv.diagnostics.hamiltonian(posed(0.1), START, (0.0, 1.0), steps=2),
            ValueError,
            r"^field: got running= or at=, expected a loss of the final state alone, which hamiltonian measures",
        ),
    ],
)
def test_objectives_that_do_not_fit(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- spans and step sizes with gradients ----

SPLIT = odeadv.SplitField(
    decay=odeadv.Operator(lambda t, x: -t * x, flow=lambda t, dt, x: x * torch.exp(-dt * (t + 0.5 * dt))),
    wave=f,
    wind=odeadv.fields.Forcing(lambda t: torch.cos(torch.as_tensor(t, dtype=torch.float64)) * START),
)
DRIVEN = odeadv.AdversarialField(f, squared, 0.2, running=running)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        (f, {"scheme": "rk4"}),
        (SPLIT, {"scheme": "strang", "substep": {"decay": "exact", "wave": "rk4", "wind": "midpoint"}}),
        (SPLIT, {"scheme": "rk4"}),
        (odeadv.AdversarialField(f, squared, 0.2), {"scheme": "lie", "differentiate_costate": True}),
        (DRIVEN, {"scheme": "strang-midpoint", "differentiate_costate": True}),
        (DRIVEN, {"scheme": "rk4", "costate": "hermite", "sweeps": 2, "differentiate_costate": True}),
    ],
)
def test_gradients_by_the_span_are_those_of_finite_differences(field, options):
    def end(t0: Tensor | float, t1: Tensor | float) -> Tensor:
        sol = odeadv.solve(field, START, (t0, t1), steps=3, **options)
        return sol.xs[-1] if sol.loss is None else torch.cat([sol.xs[-1], sol.loss[None]])

    ends = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.2, 1.1)]
    assert torch.allclose(end(*ends), end(0.2, 1.1), rtol=1e-14)
    assert torch.autograd.gradcheck(end, ends)


def test_the_gradient_by_the_end_is_the_velocity_there_and_by_the_step_size_is_that_of_all_steps():
    t1, dt = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 0.05))
    end = odeadv.solve(f, START, (0.0, t1), scheme="rk4", steps=20).xs[-1]
    by_end = torch.stack([torch.autograd.grad(x, t1, retain_graph=True)[0] for x in end])
    assert torch.allclose(by_end, f(t1, end), rtol=1e-5)
    stepped = odeadv.solve(f, START, (0.0, 1.0), scheme="rk4", dt=dt).xs[-1]
    assert torch.autograd.grad(stepped.sum(), dt)[0] == pytest.approx(20 * by_end.sum().item())
    inside = torch.func.grad(lambda t: odeadv.solve(f, START, (0.0, t), scheme="rk4", steps=20).xs[-1].sum())
    assert inside(t1.detach()) == pytest.approx(by_end.sum().item())
    adaptive = odeadv.solve(f, START, torch.stack([0 * t1, t1]), dt="adaptive", substep="rk4", rtol=1e-6).xs[-1]
    assert torch.autograd.grad(adaptive.sum(), t1)[0] == pytest.approx(by_end.sum().item(), rel=1e-4)


def test_spans_with_gradients_that_do_not_fit():
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"^t_span: got a tensor that requires a gradient for a field with pieces or"):
        odeadv.solve(posed(), START, (0.0, one), steps=2)
    with pytest.raises(ValueError, match=r"^dt: got a tensor that requires a gradient for a field with pieces"):
        odeadv.solve(odeadv.Piecewise([f, f], [0, 1, 2]), START, (0.0, 2.0), dt=one)
    with pytest.raises(ValueError, match=r"^t_span, dt: got gradients for the end of the span and for the step size"):
        odeadv.solve(f, START, (0.0, one), dt=one / 4)
    with pytest.raises(ValueError, match=r"^t_span: got times that require gradients, .* a compiled solve"):
        odeadv.compile_solver(f, scheme="rk4")(START, (0.0, one), steps=2)


def test_the_example_of_control_finds_the_closed_loop():
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "control.py"), run_name="not main")
    x0 = torch.tensor([0.2, 0.0], dtype=torch.float64)
    solution = example["controlled"](example["linear"], x0, horizon=1.0)
    assert torch.allclose(solution.costate(0.0), example["riccati"] @ x0, rtol=1e-5)
