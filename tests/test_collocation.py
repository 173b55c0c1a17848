"""The converged costate by collocation (costate="collocation")."""

import math

import pytest
import test_control
import torch
from helpers import INTEGRAL, LAM, X0, Y0, A, Q, T, measured_order, scalar_field
from test_sweeps import bent, fixed_point_of_linear_problem
from torch import Tensor

import odeadv

METHOD = {"t_span": (0.0, T), "costate": "collocation", "sweeps": "converge"}


def linear(eta: float) -> odeadv.AdversarialField:
    return odeadv.AdversarialField(lambda t, x: A @ x, lambda x: 0.5 * x @ Q @ x, eta=eta)


@pytest.mark.parametrize("eta", [0.2, 1.5])  # eta * I below and above 1
@pytest.mark.parametrize(("scheme", "order"), [("midpoint", 2), ("rk4", 4), ("strang-symmetric", 2)])
def test_state_and_costate_have_the_order_of_the_scheme(scheme, order, eta):
    exact = fixed_point_of_linear_problem(eta)

    def solve(steps: int) -> odeadv.Solution:
        substep = "rk4" if scheme == "strang-symmetric" else None
        return odeadv.solve(linear(eta), Y0, steps=steps, scheme=scheme, substep=substep, **METHOD)

    assert solve(2).order == order
    solutions = {n: solve(n) for n in (6, 12, 24)}
    for error in (
        lambda n: float((solutions[n].xs[-1] - exact).norm()),
        lambda n: float((solutions[n].costate(T) - Q @ exact).norm()),
    ):
        assert measured_order(error, tuple(solutions)) == pytest.approx(order, abs=0.25)


def test_a_linear_problem_takes_one_set_of_jacobians():
    sol = odeadv.solve(linear(0.6), Y0, steps=5, scheme="rk4", **METHOD)
    points, stages = 5 * 2, 5 * 4
    assert sol.stats.evaluations["f"] == 2 * points + stages
    assert (sol.stats.vjps, sol.stats.jvps, sol.stats.recordings) == (2 * points, 2 * 3 * points, 0)
    assert sol.stats.residuals[1] < 1e-13


def test_the_hamiltonian_of_a_linear_problem_is_conserved():
    """Gauss methods conserve quadratic invariants, here a . A x + eta |a|^2 / 2."""
    costate = odeadv.solve(linear(0.6), Y0, steps=3, scheme="midpoint", **METHOD).costate
    energies = [float(a @ A @ x + 0.3 * a @ a) for x, a in zip(costate.states, costate.nodes, strict=True)]
    assert max(energies) - min(energies) < 1e-12


@pytest.mark.parametrize("sweeps", ["converge", odeadv.Converge(rtol=1e-4)])
def test_the_same_solution_as_sweeps_with_fewer_evaluations(sweeps):
    found = odeadv.solve(bent(), Y0, steps=16, scheme="rk4", **{**METHOD, "sweeps": sweeps})
    swept = odeadv.solve(bent(), Y0, (0.0, T), steps=16, scheme="rk4", costate="hermite", sweeps=sweeps)
    assert torch.allclose(found.xs[-1], swept.xs[-1], rtol=1e-4)
    assert found.stats.residuals[-1] <= (1e-10 if sweeps == "converge" else 1e-4)

    def work(sol: odeadv.Solution) -> int:
        return sol.stats.evaluations["f"] + sol.stats.vjps + sol.stats.jvps

    assert sweeps != "converge" or work(found) < 0.9 * work(swept)
    backward = {"x0": Y0, "t_span": (T, 0.0), "steps": 16, "scheme": "rk4", "sweeps": sweeps}
    found, swept = (odeadv.solve(bent(), costate=kind, **backward) for kind in ("collocation", "hermite"))
    assert torch.allclose(found.xs[-1], swept.xs[-1], rtol=1e-3)


def test_a_second_beginning_finds_what_the_first_one_does_not():
    """Near a fold the constant state is too far away, and the trajectory of f alone is not."""
    field = odeadv.AdversarialField(lambda t, x: torch.tanh(x @ A.T), lambda x: (x**2).sum(), torch.tensor([0.1, 0.3]))
    x0 = torch.stack([Y0, 0.5 * Y0])
    sol = odeadv.solve(field, x0, steps=8, scheme="rk4", **METHOD)
    newton = odeadv.Converge(method="newton")
    swept = odeadv.solve(field, x0, (0.0, T), steps=8, scheme="rk4", costate="hermite", sweeps=newton)
    assert torch.allclose(sol.xs[-1], swept.xs[-1], rtol=1e-2)
    assert max(sol.stats.residuals[-3:]) < 1e-4 < sol.stats.residuals[5]


@pytest.mark.parametrize("eta", [-0.2, 0.2])
def test_a_second_beginning_if_the_loss_is_flat_at_the_first_one(eta):
    """x(T) = sin 1 + 4 eta x(T)^3; at x0 = 0 the loss has neither a gradient nor a second derivative."""
    field = odeadv.AdversarialField(lambda t, x: torch.cos(t) + 0.0 * x, lambda x: (x**4).sum(), eta)
    problem = {"t_span": (0.0, 1.0), "steps": 8, "scheme": "rk4", "costate": "collocation", "sweeps": "converge"}
    end = odeadv.solve(field, torch.zeros(1, dtype=torch.float64), **problem).xs[-1].item()
    assert end - 4.0 * eta * end**3 == pytest.approx(math.sin(1.0), rel=1e-6)


@pytest.mark.parametrize("eta", [2.0, 4.0, 8.0])
def test_a_conjugate_point_at_a_node_is_no_obstacle(eta):
    """The Riccati equation has a pole there. The boundary-value problem is regular: x(1) = x0 + eta x(1)."""
    field = odeadv.AdversarialField(lambda t, x: 0.0 * x, lambda x: 0.5 * (x**2).sum(), eta)
    sol = odeadv.solve(field, Y0, steps=8, scheme="rk4", **{**METHOD, "t_span": (0.0, 1.0)})
    assert torch.allclose(sol.xs[-1], Y0 / (1.0 - eta), rtol=1e-12)


@pytest.mark.parametrize("h", [0.1, 0.0999, 0.2])  # f = -20 x; at 0.1 one point per step is singular forward in time
def test_a_fast_decay_takes_one_set_of_jacobians(h):
    field = odeadv.AdversarialField(lambda t, x: -20.0 * x, lambda x: 0.5 * (x**2).sum(), eta=0.5)
    sol = odeadv.solve(field, Y0, dt=h, scheme="implicit-midpoint", **{**METHOD, "t_span": (0.0, 10 * h)})
    states = torch.stack(list(sol.costate.states))
    ratio = (1.0 - 10.0 * h) / (1.0 + 10.0 * h)
    assert len(sol.stats.residuals) <= 2
    assert torch.allclose(states[:9], Y0 * ratio ** torch.arange(9.0, dtype=torch.float64)[:, None], atol=1e-3)


@pytest.mark.parametrize("steps", [32, 128])
def test_a_costate_of_zero_is_found_to_rounding(steps):
    """The loss is smallest at the end of the trajectory of f alone. The costate is the error of the steps there."""
    target = math.exp(-1.0)
    field = odeadv.AdversarialField(lambda t, x: -x, lambda x: 0.5 * ((x - target) ** 2).sum(), eta=0.5)
    one = torch.ones(2, dtype=torch.float64)
    sol = odeadv.solve(field, one, steps=steps, scheme="rk4", **{**METHOD, "t_span": (0.0, 1.0)})
    assert len(sol.stats.residuals) <= 3
    assert float(sol.costate(1.0).abs().max()) < 1e-8


def test_errors_that_grow_in_the_solve_are_said():
    """The optimal state decays, but the open-loop solve of dx/dt = 10 x + eta a amplifies errors by exp(30)."""
    field = odeadv.AdversarialField(lambda t, x: 10.0 * x, None, -1.0, running=lambda t, x: 0.5 * (x**2).sum())
    with pytest.warns(odeadv.AccuracyWarning, match="^costate: got a final state that differs"):
        sol = odeadv.solve(field, Y0, steps=32, scheme="rk4", **{**METHOD, "t_span": (0.0, 3.0)})
    assert float(sol.costate.states[-1].abs().max()) < 1e-3 < float(sol.xs[-1].abs().max())


def test_newton_steps_are_not_called_sweeps():
    with pytest.raises(odeadv.SolveError, match=r"the iteration for the costate did not converge .* iterations\)"):
        odeadv.solve(bent(), Y0, steps=4, scheme="rk4", **{**METHOD, "sweeps": odeadv.Converge(most=2)})


def test_autocast_does_not_reach_the_linear_systems():
    field = odeadv.AdversarialField(lambda t, x: torch.tanh(x), lambda x: 0.5 * (x**2).sum(), eta=0.2)
    problem = {**METHOD, "x0": torch.ones(4), "steps": 8, "scheme": "rk4"}
    plain = odeadv.solve(field, **problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = odeadv.solve(field, **problem)
    assert sol.stats.residuals == plain.stats.residuals
    field = odeadv.AdversarialField(lambda t, x: torch.tanh(x @ torch.eye(4)), lambda x: 0.5 * (x**2).sum(), eta=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # f keeps autocast
        sol = odeadv.solve(field, **{**problem, "sweeps": odeadv.Converge(rtol=1e-2)})
    assert 0.0 < float((sol.xs[-1] - plain.xs[-1]).abs().max()) < 0.05


def test_beyond_eta_I_of_one_and_at_one():
    beyond = odeadv.solve(scalar_field(1.7 / INTEGRAL), X0, steps=16, scheme="rk4", **METHOD)
    assert torch.allclose(beyond.xs[-1], X0 * math.exp(LAM * T) / (1 - 1.7), rtol=1e-5)
    for steps, scheme in ((4, "rk4"), (4, "midpoint")):
        # x(T) = free / (1 - eta I), with the I of these steps
        problem = {"x0": X0, "steps": steps, "scheme": scheme, **METHOD}
        free, found = (odeadv.solve(scalar_field(eta), **problem).costate.states[-1] for eta in (1e-9, 0.3))
        singular = 0.3 / (1.0 - float((free / found).mean()))
        for rtol in (None, 1e-2):
            for dtype in (torch.float32, torch.float64):
                problem |= {"x0": X0.to(dtype), "sweeps": odeadv.Converge(rtol=rtol, most=10)}
                sol = odeadv.solve(scalar_field(singular), **problem, throw=False)
                assert sol.status is odeadv.Status.NOT_CONVERGED


def test_running_costs_complex_states_structures_and_pieces():
    sol = odeadv.solve(test_control.regulator(), test_control.X0, (0.0, 1.5), scheme="rk4", steps=24, **{
        key: value for key, value in METHOD.items() if key != "t_span"
    })  # fmt: skip
    end, first = test_control.riccati(1.5)
    assert torch.allclose(sol.xs[-1], end, rtol=1e-5)
    assert torch.allclose(sol.costate(0.0), first, rtol=1e-6)

    rate = 1j - 0.3
    field = odeadv.AdversarialField(lambda t, x: rate * x, lambda x: 0.5 * (x * x.conj()).real.sum(), eta=0.3)
    z0 = torch.tensor([1.0 + 0.5j, -0.2j], dtype=torch.complex128)
    growth = torch.exp(torch.tensor(rate * T, dtype=torch.complex128))
    exact = z0 * growth / (1 - 0.3 * (math.exp(-0.6 * T) - 1) / -0.6)
    assert torch.allclose(odeadv.solve(field, z0, steps=16, scheme="rk4", **METHOD).xs[-1], exact, rtol=1e-5)

    named = odeadv.AdversarialField(
        lambda t, s: {"p": s["q"], "q": -torch.sin(s["p"])}, lambda s: 0.5 * (s["p"] ** 2).sum(), 0.3
    )
    plain = odeadv.AdversarialField(lambda t, s: torch.stack([s[1], -torch.sin(s[0])]), lambda s: 0.5 * s[0] ** 2, 0.3)
    one = torch.ones(1, dtype=torch.float64)
    found = odeadv.solve(named, {"p": one, "q": 0 * one}, steps=4, scheme="rk4", **METHOD)
    same = odeadv.solve(plain, torch.cat([one, 0 * one]), steps=4, scheme="rk4", **METHOD)
    assert torch.allclose(found.costate(0.3)["p"], same.costate(0.3)[:1], rtol=1e-12)

    pieces = odeadv.Piecewise(
        [odeadv.Operator(lambda t, x: A @ x), odeadv.Operator(lambda t, x: -A @ x)], [0.0, 1.0, T]
    )
    split = odeadv.AdversarialField(pieces, lambda x: 0.5 * x @ Q @ x, eta=0.2)
    swept = odeadv.solve(split, Y0, (0.0, T), dt=0.125, costate="hermite", scheme="rk4", sweeps="converge")
    assert torch.allclose(odeadv.solve(split, Y0, dt=0.125, scheme="rk4", **METHOD).xs[-1], swept.xs[-1], rtol=1e-4)


def test_gradients_are_those_of_finite_differences():
    def end(x0: Tensor, rate: Tensor, eta: Tensor, t1: Tensor) -> Tensor:
        field = odeadv.AdversarialField(
            lambda t, x: torch.tanh(rate * A @ x) * torch.cos(t), lambda x: rate * 0.5 * x @ Q @ x, eta,
            running=lambda t, x: 0.01 * rate * t * (x**4).sum(),
        )  # fmt: skip
        sol = odeadv.solve(
            field, x0, (0.0, t1), steps=2, scheme="rk4", costate="collocation", differentiate_costate=True,
            sweeps=odeadv.Converge(rtol=1e-13),
        )  # fmt: skip
        return torch.cat([sol.xs[-1], sol.costate(0.13 * t1.item()), sol.loss[None]])

    one = torch.ones((), dtype=torch.float64)
    inputs = [v.clone().requires_grad_() for v in (Y0, one, 0.2 * one, T * one)]
    assert torch.autograd.gradcheck(end, inputs, eps=1e-4, atol=1e-6)


def test_second_derivatives_are_refused():
    x0 = Y0.clone().requires_grad_()
    sol = odeadv.solve(bent(), x0, steps=2, scheme="rk4", differentiate_costate=True, **METHOD)
    with pytest.raises(RuntimeError, match="got a second derivative through a converged costate"):
        torch.autograd.grad(sol.loss, x0, create_graph=True)


def test_no_gradient_passes_through_the_costate_by_default():
    x0 = Y0.clone().requires_grad_()
    sol = odeadv.solve(bent(), x0, steps=2, scheme="rk4", **METHOD)
    constant = odeadv.solve(
        bent().driven_by(lambda t: sol.costate(float(t)).detach()), x0, (0.0, T), steps=2, scheme="rk4"
    )
    gradients = (torch.autograd.grad(s.xs[-1].sum(), x0)[0] for s in (sol, constant))
    assert torch.allclose(*gradients, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweeps": None}, r"^costate: got 'collocation' without converging sweeps"),
        ({"sweeps": 2}, r"^costate: got 'collocation' without converging sweeps"),
        ({"dt": "adaptive"}, r"^costate: got 'collocation' for adaptive steps"),
        ({"checkpoints": 2}, r"^checkpoints, sweeps: Newton's method keeps the graph"),
        ({"field": odeadv.AdversarialField(bent().f, None, 0.1, at={0.75: lambda x: x.sum()})}, "for losses at times"),
        ({"field": bent().transformed(list)}, r"^costate: got 'collocation' for a transformed field"),
        ({"x0": torch.zeros(257)}, r"^costate: got 'collocation' for a state of 257 numbers, expected at most 256"),
        (
            {"field": odeadv.AdversarialField(lambda t, x: x, lambda x: torch.zeros(()), 0.1)},
            r"^loss: does not depend on the state",
        ),
        (
            {"field": odeadv.AdversarialField(lambda t, x: x, None, 0.1, running=lambda t, x: 2.0 * t)},
            r"^loss: does not depend on the state",
        ),
    ],
)
def test_what_cannot_be_done_is_said(options, message):
    problem = {"field": bent(), "x0": Y0, **METHOD, **options}
    if "dt" not in options:
        problem["steps"] = 2
    with pytest.raises(ValueError, match=message):
        odeadv.solve(**problem)


def test_torch_func_and_compiled_solvers_refuse():
    with pytest.raises(ValueError, match=r"not inside torch\.func"):
        torch.func.grad(lambda x: odeadv.solve(bent(), x, steps=2, scheme="rk4", **METHOD).loss)(Y0)
    with pytest.raises(ValueError, match=r"^costate: got 'collocation', which needs converging sweeps"):
        odeadv.compile_solver(bent(), scheme="rk4", costate="collocation")
