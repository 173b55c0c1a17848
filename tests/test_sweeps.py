"""Sweeps to convergence against closed forms; checkpoints; torch.func transforms."""

import math

import pytest
import torch
from helpers import INTEGRAL, LAM, X0, Y0, A, Q, T, measured_order, scalar_field
from torch import Tensor, nn

import odeadv
from benchmarks._expm import matrix_exp

NEWTON = odeadv.Converge(method="newton")
ACCURATE = {"scheme": "strang-symmetric", "substep": "rk4", "costate": "hermite"}


def fixed_point_of_linear_problem(eta: float) -> Tensor:
    """x(T) of the two-point problem dx/dt = A x + eta a, da/dt = -A^T a, a(T) = Q x(T), by one matrix exponential."""
    top = torch.cat([A, eta * torch.eye(3, dtype=A.dtype)], dim=1)
    e = matrix_exp(torch.cat([top, torch.cat([torch.zeros_like(A), -A.T], dim=1)]) * T)
    a0 = torch.linalg.solve(e[3:, 3:] - Q @ e[:3, 3:], (Q @ e[:3, :3] - e[3:, :3]) @ Y0)
    return e[:3, :3] @ Y0 + e[:3, 3:] @ a0


@pytest.mark.parametrize("memory", [0, 3])
def test_the_fixed_point_of_the_scalar_problem(memory):
    eta = 0.5 / INTEGRAL
    sol = odeadv.solve(
        scalar_field(eta), X0, (0.0, T), steps=64, sweeps=odeadv.Converge(memory=memory, rtol=1e-11), **ACCURATE
    )
    exact = X0 * math.exp(LAM * T) / (1 - eta * INTEGRAL)
    assert torch.allclose(sol.xs[-1], exact, rtol=1e-4)
    assert sol.status is odeadv.Status.SUCCESS
    assert sol.stats.residuals[-1] <= 1e-11 < sol.stats.residuals[-2]
    assert sol.stats.recordings == len(sol.stats.residuals) + 1
    if memory == 0:  # plain sweeps contract by eta * I
        ratios = [b / a for a, b in zip(sol.stats.residuals[3:20], sol.stats.residuals[4:21], strict=True)]
        assert ratios == pytest.approx([eta * INTEGRAL] * len(ratios), rel=0.05)
    else:
        assert len(sol.stats.residuals) <= 4


def test_plain_sweeps_that_diverge_are_reported_and_acceleration_solves_them():
    eta = 1.7 / INTEGRAL
    problem = {"x0": X0, "t_span": (0.0, T), "steps": 64, **ACCURATE}
    with pytest.raises(odeadv.SolveError, match=r"did not converge .*eta \* I is 1 or more"):
        odeadv.solve(scalar_field(eta), sweeps=odeadv.Converge(memory=0), **problem)
    sol = odeadv.solve(scalar_field(eta), sweeps=odeadv.Converge(memory=0, most=20), throw=False, **problem)
    assert sol.status is odeadv.Status.NOT_CONVERGED
    assert sol.stats.residuals[-1] > 0.1
    assert bool(sol.xs[-1].isfinite())
    accelerated = odeadv.solve(scalar_field(eta), sweeps="converge", **problem)
    assert torch.allclose(accelerated.xs[-1], X0 * math.exp(LAM * T) / (1 - 1.7), rtol=1e-3)


@pytest.mark.parametrize("sweeps", ["converge", NEWTON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_there_is_no_fixed_point_none_is_returned(dtype, sweeps):
    h = T / 4
    integral = sum(h * (1 + h * LAM) ** (2 * (3 - n)) for n in range(4))  # the discrete I of Lie with Euler
    field = scalar_field(1.0 / integral)
    sol = odeadv.solve(field, X0.to(dtype), (0.0, T), steps=4, scheme="lie", sweeps=sweeps, throw=False)
    assert sol.status is not odeadv.Status.SUCCESS


# ---- Newton's method, coarse grids, gradients of the fixed point ----


def bent(rate: float | Tensor = 1.0, eta: float | Tensor = 0.2) -> odeadv.AdversarialField:
    return odeadv.AdversarialField(lambda t, x: torch.tanh(rate * A @ x), lambda x: 0.5 * x @ Q @ x, eta=eta)


@pytest.mark.parametrize("kind", ["linear", "hermite", "exact"])
def test_newton_squares_the_error_and_finds_the_same_fixed_point(kind):
    problem = {"x0": Y0, "t_span": (0.0, T), "steps": 4, "scheme": "rk4", "costate": kind}
    sol = odeadv.solve(bent(), **problem, sweeps=odeadv.Converge(method="newton", rtol=1e-13))
    assert torch.allclose(sol.xs, odeadv.solve(bent(), **problem, sweeps="converge").xs, rtol=1e-9)
    errors = [error for error in sol.stats.residuals if 1e-7 < error < 0.05]
    assert len(errors) >= 2
    assert all(b < 3.0 * a * a for a, b in zip(errors, [*errors[1:], sol.stats.residuals[-1]], strict=True))
    assert sol.stats.residuals[-1] <= 1e-13


def test_newton_beyond_eta_I_of_one_in_more_directions_than_anderson_remembers():
    rates = torch.linspace(0.3, 1.0, 8, dtype=torch.float64)
    integral = (torch.exp(2 * rates) - 1) / (2 * rates)
    field = odeadv.AdversarialField(lambda t, x: rates * x, lambda x: 0.5 * (x**2).sum(), eta=3.0)
    problem = {"x0": torch.ones(8, dtype=torch.float64), "t_span": (0.0, 1.0), "steps": 16, "scheme": "rk4"}
    found = odeadv.solve(field, **problem, costate="hermite", sweeps=NEWTON)
    assert torch.allclose(found.xs[-1], torch.exp(rates) / (1 - 3.0 * integral), rtol=1e-4)
    with pytest.raises(odeadv.SolveError, match="did not converge"):
        odeadv.solve(field, **problem, sweeps=odeadv.Converge(memory=3, most=20))


def test_coarse_grids_save_work():
    problem = {"x0": Y0, "t_span": (0.0, T), "steps": 32, "scheme": "rk4", "costate": "hermite"}
    whole = odeadv.solve(bent(), **problem, sweeps=odeadv.Converge(rtol=1e-6, nested=False))
    nested = odeadv.solve(bent(), **problem, sweeps=odeadv.Converge(rtol=1e-6))
    assert torch.allclose(nested.xs, whole.xs, rtol=1e-6)
    assert nested.stats.evaluations["f"] + nested.stats.vjps < 0.75 * (whole.stats.evaluations["f"] + whole.stats.vjps)
    assert nested.costate.grid == whole.costate.grid
    odd = odeadv.solve(bent(), **{**problem, "steps": 9}, sweeps=odeadv.Converge(nested=True))
    plain = odeadv.Converge(nested=False)
    assert odd.stats == odeadv.solve(bent(), **{**problem, "steps": 9}, sweeps=plain).stats
    second = {**problem, "costate": "linear"}  # the whole is of order two: coarse grids are not tried
    assert odeadv.solve(bent(), **second, sweeps="converge").stats == odeadv.solve(bent(), **second, sweeps=plain).stats


@pytest.mark.parametrize("seed", range(6))
def test_coarse_grids_change_neither_the_fixed_point_nor_its_gradient(seed):
    """Random non-linear f and time dependence, with eta * I from far below 1 to above it."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    x0 = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
    eta, steps = (0.05, 0.3, -1.5)[seed % 3], (8, 12, 16)[seed // 2]
    field = odeadv.AdversarialField(
        lambda t, x: torch.tanh(a @ x) + 0.3 * torch.sin(4.0 * t) * (b @ x), lambda x: 0.5 * (x * x).sum(), eta
    )
    results = []
    for nested in (False, None):
        sol = odeadv.solve(
            field, x0, (0.0, 1.0), steps=steps, scheme="rk4", costate="hermite", differentiate_costate=True,
            sweeps=odeadv.Converge(nested=nested),
        )  # fmt: skip
        results.append([sol.xs[-1], sol.costate(0.3), *torch.autograd.grad(sol.loss, x0)])
    assert all(torch.allclose(*pair, rtol=1e-7, atol=1e-9) for pair in zip(*results, strict=True))


def test_coarse_grids_that_are_unstable_are_passed_over():
    """RK4 is stable for |h rate| < 2.78: on 32 steps at rate -60, not on 4, 8 or 16."""

    def f(t: Tensor, x: Tensor) -> Tensor:
        return torch.stack([-60.0 * (x[0] - torch.cos(x[1])), 0.5 * x[0] * x[1]])

    field = odeadv.AdversarialField(f, lambda x: 0.5 * (x * x).sum(), 0.4)
    problem = {"x0": torch.tensor([0.5, 1.0], dtype=torch.float64), "t_span": (0.0, 1.0), "steps": 32}
    problem |= {"scheme": "rk4", "costate": "hermite"}
    whole = odeadv.solve(field, **problem, sweeps=odeadv.Converge(nested=False))
    nested = odeadv.solve(field, **problem, sweeps="converge")
    assert torch.allclose(whole.xs, nested.xs, rtol=1e-8)
    assert nested.stats.recordings > whole.stats.recordings


@pytest.mark.parametrize("rtol", [1e-2, None])
def test_a_coarse_fixed_point_does_not_pass_for_one_that_does_not_exist(rtol):
    """At eta I = 1 on the given steps there is no fixed point; on coarser steps, whose I differs, there is."""
    problem = {"x0": X0, "t_span": (0.0, T), "steps": 16, "scheme": "rk4", "costate": "hermite"}
    free = odeadv.solve(scalar_field(0.0), **problem).xs[-1]
    found = odeadv.solve(scalar_field(0.3), **problem, sweeps=odeadv.Converge(rtol=1e-13, nested=False)).xs[-1]
    # x(T) = free / (1 - eta I), with the I of these steps
    field = scalar_field(0.3 / float(1.0 - (free / found)[0]))
    sol = odeadv.solve(field, **problem, sweeps=odeadv.Converge(rtol=rtol), throw=False)
    assert sol.status is not odeadv.Status.SUCCESS


def test_the_gradient_of_the_fixed_point_of_the_scalar_problem():
    """x(T) = x0 e^(LAM T) / (1 - eta I), so dx(T)/d eta = x(T) I / (1 - eta I)."""
    eta = torch.tensor(0.5 / INTEGRAL, dtype=torch.float64, requires_grad=True)
    problem = {"x0": X0, "t_span": (0.0, T), "steps": 16, "scheme": "rk4", "costate": "hermite"}
    for sweeps in ("converge", NEWTON):
        sol = odeadv.solve(scalar_field(eta), **problem, sweeps=sweeps, differentiate_costate=True)
        (gradient,) = torch.autograd.grad(sol.xs[-1].sum(), eta)
        assert gradient.item() == pytest.approx(float((X0 * math.exp(LAM * T)).sum()) * INTEGRAL / 0.25, rel=1e-4)


@pytest.mark.parametrize("kind", ["linear", "hermite", "exact"])
def test_gradients_of_the_fixed_point_are_those_of_finite_differences(kind):
    def end(x0: Tensor, rate: Tensor, eta: Tensor) -> Tensor:
        sol = odeadv.solve(
            bent(rate, eta), x0, (0.0, T), steps=3, scheme="rk4", costate=kind,
            sweeps=odeadv.Converge(rtol=1e-14, memory=8), differentiate_costate=True, throw=False,
        )  # fmt: skip
        assert sol.stats.residuals[-1] < 1e-12
        return torch.cat([sol.xs[-1], sol.costate(0.2), sol.loss[None]])

    one = torch.ones((), dtype=torch.float64)
    inputs = [v.clone().requires_grad_() for v in (Y0, one, 0.2 * one)]
    # Two backward passes of an older torch differ by rounding.
    assert torch.autograd.gradcheck(end, inputs, eps=1e-4, atol=1e-6, nondet_tol=1e-12)


def test_second_derivatives_of_the_fixed_point_are_refused():
    """A part of them would pass through the final solve, and the rest would be missing."""
    x0 = Y0.clone().requires_grad_()
    problem = {"t_span": (0.0, T), "steps": 2, "scheme": "rk4", "sweeps": "converge", "differentiate_costate": True}
    loss = odeadv.solve(bent(), x0, **problem).loss
    with pytest.raises(RuntimeError, match="got a second derivative through a converged costate"):
        torch.autograd.grad(loss, x0, create_graph=True)
    torch.autograd.grad(loss, x0)


@pytest.mark.parametrize("eta", [0.2, 0.6, 1.5])
def test_the_fixed_point_of_a_linear_system_and_its_order(eta):
    exact = fixed_point_of_linear_problem(eta)

    def error(steps: int) -> float:
        field = odeadv.AdversarialField(lambda t, x: A @ x, lambda x: 0.5 * x @ Q @ x, eta=eta)
        sol = odeadv.solve(field, Y0, (0.0, T), steps=steps, sweeps="converge", **ACCURATE)
        return float((sol.xs[-1] - exact).norm())

    assert measured_order(error, (16, 32, 64)) == pytest.approx(2, abs=0.15)


def test_the_hamiltonian_is_kept_to_the_order_of_the_scheme():
    eta = 0.4

    def f(t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(A @ x)

    def drift(steps: int) -> float:
        field = odeadv.AdversarialField(f, lambda x: 0.5 * x @ Q @ x, eta=eta)
        sol = odeadv.solve(
            field, Y0, (0.0, T), steps=steps, sweeps="converge", save_at="steps", scheme="strang-symmetric",
            substep="midpoint",
        )  # fmt: skip
        values = []
        for t, x in zip(sol.ts.tolist(), sol.xs, strict=True):
            a = sol.costate(t)
            values.append(float(a @ f(t, x) + 0.5 * eta * a @ a))
        return max(values) - min(values)

    assert measured_order(drift) == pytest.approx(2, abs=0.15)


def test_complex_states_and_float32_converge():
    field = odeadv.AdversarialField(lambda t, x: 1j * x - 0.3 * x, lambda x: 0.5 * (x * x.conj()).real.sum(), eta=0.3)
    x0 = torch.tensor([1.0 + 0.5j, -0.2j], dtype=torch.complex128)
    sol = odeadv.solve(field, x0, (0.0, T), steps=64, sweeps="converge", **ACCURATE)
    integral = (math.exp(-0.6 * T) - 1) / -0.6
    exact = x0 * torch.exp(torch.tensor((1j - 0.3) * T, dtype=torch.complex128)) / (1 - 0.3 * integral)
    assert torch.allclose(sol.xs[-1], exact, rtol=1e-4)
    single = odeadv.solve(scalar_field(0.5), X0.float(), (0.0, T), steps=16, sweeps="converge", **ACCURATE)
    assert single.status is odeadv.Status.SUCCESS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: odeadv.Converge(rtol=0.0), r"^rtol: got 0\.0"),
        (lambda: odeadv.Converge(most=1), r"^most: got 1, expected an integer, at least 2"),
        (lambda: odeadv.Converge(memory=-1), r"^memory: got -1, expected an integer, at least 0"),
        (lambda: odeadv.Converge(rtol=math.inf), r"^rtol: got inf"),
        (lambda: odeadv.solve(scalar_field(0.1), X0, (0, T), steps=2, sweeps="forever"), r"^sweeps: got 'forever'"),
        (lambda: odeadv.Converge(method="broyden"), r"^method: got 'broyden', expected one of 'anderson', 'newton'"),
        (
            lambda: odeadv.solve(scalar_field(0.1), X0, (0, T), steps=2, sweeps=NEWTON, checkpoints=2),
            r"^checkpoints, sweeps: Newton's method keeps the graph",
        ),
        (
            lambda: torch.func.grad(
                lambda x: (
                    odeadv.solve(
                        scalar_field(0.1), x, (0, T), steps=2, sweeps="converge", differentiate_costate=True
                    ).loss
                )
            )(X0),
            r"^sweeps: .* work with torch\.autograd, not inside torch\.func",
        ),
        (
            lambda: odeadv.solve(scalar_field(0.1), X0, (0, T), steps=2, checkpoints=2, differentiate_costate=True),
            r"^checkpoints, differentiate_costate",
        ),
        (lambda: odeadv.solve(scalar_field(0.1), X0, (0, T), steps=2, checkpoints=0), r"^checkpoints: got 0"),
    ],
)
def test_what_cannot_be_done_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- checkpoints ----


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Dropout(0.3)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.linear(self.norm(x))))


@pytest.mark.parametrize("checkpoints", [1, 3, 4, 10, 50])
@pytest.mark.parametrize("scheme", ["lie", "strang-midpoint"])
def test_checkpoints_change_nothing(checkpoints, scheme):
    torch.manual_seed(0)
    module = Noisy()
    field = odeadv.AdversarialField(module, lambda x: (x**3).mean(), eta=3.0)
    x0 = torch.randn(8, 6)
    results = []
    for k in (None, checkpoints):
        torch.manual_seed(1)
        module.norm.reset_running_stats()
        sol = odeadv.solve(field, x0, (0.0, 2.0), steps=10, scheme=scheme, sweeps=2, checkpoints=k)
        results.append([sol.xs[-1], module.norm.running_mean.clone(), torch.get_rng_state(), *sol.costate.nodes])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpoints_keep_fewer_tensors_alive():
    alive = peak = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, peak
            self.tensor = tensor
            alive += 1
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    field = odeadv.AdversarialField(lambda t, x: torch.tanh(torch.sin(x)), lambda x: (x**2).sum(), eta=0.1)
    peaks = {}
    for checkpoints in (None, 8):
        alive = peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor), torch.no_grad():
            odeadv.solve(field, torch.ones(4), (0.0, 1.0), steps=64, checkpoints=checkpoints)
        peaks[checkpoints] = peak
    assert peaks[8] <= peaks[None] / 8 + 2


# ---- torch.func ----


@pytest.mark.parametrize("scheme", ["strang", "strang-midpoint", "extrapolated-strang4"])
@pytest.mark.filterwarnings("ignore::odeadv.AccuracyWarning")
def test_vmap_of_an_adversarial_solve(scheme):
    field = odeadv.AdversarialField(lambda t, x: torch.tanh(A @ x), lambda x: 0.5 * x @ Q @ x, eta=0.3)

    def end(x0: Tensor) -> Tensor:
        return odeadv.solve(field, x0, (0.0, T), steps=5, scheme=scheme, sweeps=2).xs[-1]

    batch = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = torch.func.vmap(end)(batch)
    assert torch.allclose(together, torch.stack([end(x0) for x0 in batch]), rtol=1e-12)


@pytest.mark.parametrize("differentiate", [False, True])
def test_func_grad_and_jvp_agree_with_autograd(differentiate):
    field = odeadv.AdversarialField(lambda t, x: torch.tanh(A @ x), lambda x: 0.5 * x @ Q @ x, eta=0.3)

    def loss(x0: Tensor) -> Tensor:
        return odeadv.solve(
            field, x0, (0.0, T), steps=5, scheme="strang-midpoint", differentiate_costate=differentiate
        ).loss

    x0 = Y0.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x0), x0)
    assert torch.allclose(torch.func.grad(loss)(Y0), expected, rtol=1e-12)
    jacobian = torch.func.jacrev(lambda x: odeadv.solve(lambda t, y: torch.sin(A @ y), x, (0, 1), steps=4).xs[-1])(Y0)
    forward = torch.func.jacfwd(lambda x: odeadv.solve(lambda t, y: torch.sin(A @ y), x, (0, 1), steps=4).xs[-1])(Y0)
    assert torch.allclose(jacobian, forward, rtol=1e-12)


def test_sweeps_to_convergence_inside_torch_func():
    def end(x0: Tensor, f=lambda t, x: LAM * x) -> Tensor:
        field = odeadv.AdversarialField(f, lambda x: 0.5 * (x**2).sum(), eta=0.1)
        return odeadv.solve(field, x0, (0.0, T), steps=4, scheme="lie", sweeps="converge").xs[-1]

    def never(t: Tensor, x: Tensor) -> Tensor:
        raise AssertionError

    message = r"^sweeps: 'converge' decides by the values of states, which torch\.func\.vmap does not allow; give a num"
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(lambda x0: end(x0, never))(X0.repeat(3, 1))
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(lambda rate: end(X0, lambda t, x: rate * x))(torch.ones(3, dtype=X0.dtype))
    assert torch.allclose(torch.func.vjp(end, X0)[0], end(X0), rtol=1e-12)


def test_second_derivatives():
    field = odeadv.AdversarialField(lambda t, x: torch.tanh(A @ x), lambda x: 0.5 * x @ Q @ x, eta=0.3)

    def end(x0: Tensor) -> Tensor:
        return odeadv.solve(field, x0, (0.0, 1.0), steps=2, scheme="strang", differentiate_costate=True).xs[-1]

    assert torch.autograd.gradgradcheck(end, (Y0.clone().requires_grad_(),))


# ---- recorded nodes ----


def test_the_recorded_nodes_are_there():
    field = odeadv.AdversarialField(lambda t, x: torch.tanh(A @ x), lambda x: 0.5 * x @ Q @ x, eta=0.3)
    one = odeadv.solve(field, Y0, (0.0, T), steps=4)
    states = odeadv.solve(field.f, Y0, (0.0, T), steps=4, scheme="euler", save_at="steps").xs
    kept = odeadv.solve(field, Y0, (0.0, T), steps=4, costate="hermite").costate
    assert all(torch.equal(a, b) for a, b in zip(kept.states, states, strict=True))
    for costate in (one.costate, odeadv.solve(field, Y0, (0.0, T), steps=4, ascent=3).costate):
        assert costate.grid.times == (0.0, 0.375, 0.75, 1.125, 1.5)
        for t, node in zip(costate.grid.times, costate.nodes, strict=True):
            assert torch.equal(costate(t), node)
    assert torch.allclose(one.costate.nodes[-1], Q @ states[-1], rtol=1e-14)
    adaptive = odeadv.solve(field, Y0, (0.0, T), dt="adaptive", ascent=2).costate
    with pytest.raises(AttributeError, match=r"^grid: the recordings have different steps; look at each of `parts`"):
        adaptive.nodes  # noqa: B018
    assert len(adaptive.parts[1].nodes) == len(adaptive.parts[1].grid.times)


# ---- transformed recordings ----


def toy(eta: float = 0.3) -> odeadv.AdversarialField:
    return odeadv.AdversarialField(lambda t, x: torch.tanh(x @ A), lambda x: 0.5 * ((x @ Q) * x).sum(), eta=eta)


BATCH = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recordings", [{}, {"sweeps": 2}, {"ascent": 2}, {"checkpoints": 2}, {"sweeps": "converge"}])
@pytest.mark.parametrize("scheme", [*odeadv.schemes.names(), "rk4"])
@pytest.mark.filterwarnings("ignore::odeadv.AccuracyWarning")
def test_a_transform_that_changes_nothing_changes_nothing(scheme, recordings):
    if recordings.get("sweeps") == "converge" and scheme not in ("lie", "strang"):
        return
    problem = {"x0": BATCH, "t_span": (0.0, 1.0), "steps": 3, "scheme": scheme, "costate": "linear", **recordings}
    plain = odeadv.solve(toy(), **problem)
    same = odeadv.solve(toy().transformed(lambda nodes: nodes), **problem)
    assert torch.equal(plain.xs, same.xs)
    assert torch.equal(plain.costate(0.4), same.costate(0.4))
    assert plain.stats == same.stats


@pytest.mark.parametrize("checkpoints", [None, 2])
def test_a_transform_stands_between_recording_and_drive(checkpoints):
    """Each variant against Eq. 5 by hand, with the recorded gradients replaced as the variant says."""
    steps, dt, eta = 4, 0.25, 0.3
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(BATCH.shape, dtype=BATCH.dtype, generator=generator) for _ in range(steps + 1)]

    def equal_norm(nodes):
        again = torch.Generator().manual_seed(3)
        drawn = [torch.randn(node.shape, dtype=node.dtype, generator=again) for node in nodes]
        return [r * (node.norm() / r.norm()) for r, node in zip(drawn, nodes, strict=True)]

    variants = {
        "noise": (equal_norm, lambda a, n: noise[n] * (a[n].norm() / noise[n].norm())),
        "shuffled": (lambda nodes: [node.roll(1, 0) for node in nodes], lambda a, n: a[n].roll(1, 0)),
        "one only": (
            lambda nodes: [node if n == 1 else torch.zeros_like(node) for n, node in enumerate(nodes)],
            lambda a, n: a[n] if n == 1 else torch.zeros_like(a[n]),
        ),
    }
    xs = [BATCH.clone().requires_grad_()]
    for _ in range(steps):
        xs.append(xs[-1] + dt * torch.tanh(xs[-1] @ A))
    a = torch.autograd.grad(0.5 * ((xs[-1] @ Q) * xs[-1]).sum(), xs)
    for transform, drive in variants.values():
        x = BATCH
        for n in range(steps):
            x = x + dt * torch.tanh(x @ A)
            x = x + dt * eta * drive(a, n + 1)
        field = toy(eta).transformed(transform)
        sol = odeadv.solve(field, BATCH, (0.0, 1.0), dt=dt, scheme="lie", checkpoints=checkpoints)
        assert torch.allclose(sol.xs[-1], x, rtol=0, atol=1e-14)
        assert torch.allclose(sol.costate.nodes[2], drive(a, 2), rtol=0, atol=1e-14)
        assert torch.equal(
            odeadv.solve(field.driven_by(sol.costate), BATCH, (0.0, 1.0), dt=dt, scheme="lie").xs, sol.xs
        )


@pytest.mark.parametrize("recordings", [{"sweeps": 3}, {"ascent": 3}])
def test_every_recording_is_transformed_once(recordings):
    calls = []

    def scaled(nodes):
        calls.append(len(nodes))
        return [2.0 * node for node in nodes]

    eta, problem = 0.1, {"x0": BATCH, "t_span": (0.0, 1.0), "steps": 5}
    doubled = odeadv.solve(toy(eta).transformed(scaled), **problem, **recordings)
    assert calls == [6, 6, 6]
    assert torch.allclose(doubled.xs, odeadv.solve(toy(2 * eta), **problem, **recordings).xs, rtol=1e-13)
    twice = odeadv.solve(toy(eta / 2).transformed(scaled).transformed(scaled), **problem, **recordings)
    assert torch.allclose(doubled.xs, twice.xs, rtol=1e-13)
    converged = odeadv.solve(toy(eta).transformed(scaled), **problem, sweeps="converge")
    assert torch.allclose(converged.xs, odeadv.solve(toy(2 * eta), **problem, sweeps="converge").xs, rtol=1e-9)


def test_a_transformed_field_at_eta_zero_is_the_unsplit_solve():
    def never(nodes):
        raise AssertionError

    plain = odeadv.solve(lambda t, x: torch.tanh(x @ A), BATCH, (0.0, 1.0), steps=5, scheme="euler")
    assert torch.equal(plain.xs, odeadv.solve(toy(0.0).transformed(never), BATCH, (0.0, 1.0), steps=5).xs)


def test_gradients_around_and_through_a_transform():
    x0 = BATCH.clone().requires_grad_()
    field = toy().transformed(lambda nodes: [node.roll(1, 0) * node.sum() for node in nodes])
    problem = {"t_span": (0.0, 1.0), "steps": 3, "scheme": "lie"}
    held = odeadv.solve(field, x0, **problem)
    assert not held.costate.nodes[0].requires_grad

    def end(x: Tensor) -> Tensor:
        return odeadv.solve(field, x, **problem, differentiate_costate=True).xs[-1]

    assert torch.equal(end(x0), held.xs[-1])
    assert torch.autograd.gradcheck(end, (x0,))
    with torch.inference_mode():
        assert torch.equal(
            odeadv.solve(field, BATCH.clone(), **problem, sweeps=2).xs.isfinite().all(), torch.tensor(True)
        )


def test_transforms_leave_the_random_state_and_the_noise_alone():
    module = Noisy()
    x0 = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    field = odeadv.AdversarialField(module, lambda x: (x**3).mean(), eta=3.0)
    results = []
    for variant in (field, field.transformed(lambda nodes: [node + 0.0 * torch.randn_like(node) for node in nodes])):
        torch.manual_seed(1)
        module.norm.reset_running_stats()
        sol = odeadv.solve(variant, x0, (0.0, 1.0), steps=4, sweeps=2)
        results.append([sol.xs[-1], module.norm.running_mean.clone(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_transform_of_a_network_keeps_the_shape_of_every_layer():
    net = odeadv.models.preact_resnet(8, 4)
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    field = net.field(images, torch.tensor([0, 1, 2]), eta=5.0).transformed(lambda a: [node.flip(0) for node in a])
    flipped = odeadv.solve(field, scheme="strang")
    recorded = odeadv.solve(net.field(images, torch.tensor([0, 1, 2]), eta=5.0), scheme="strang").costate.nodes
    assert all(torch.allclose(a, b.flip(0), atol=1e-7) for a, b in zip(flipped.costate.nodes, recorded, strict=True))


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (3, TypeError, r"^transform: got int, expected a callable"),
        (lambda nodes: None, TypeError, r"^transform: returned NoneType, expected a sequence of 3 tensors"),
        (lambda nodes: nodes[1:], ValueError, r"^transform: returned 2 tensors, expected 3, one per node"),
        (lambda nodes: [0.0] * 3, TypeError, r"^transform: returned float for node 0"),
        (lambda nodes: [n[:2] for n in nodes], ValueError, r"^transform: returned .*\(2, 3\) on cpu for node 0, exp"),
        (lambda nodes: [n.float() for n in nodes], ValueError, r"^transform: returned torch\.float32 .*float64 of sh"),
        (lambda nodes: [n.mul_(2.0) for n in nodes], ValueError, r"^transform: modifies the recorded nodes in place"),
    ],
)
def test_what_a_transform_must_return(transform, error, message):
    with pytest.raises(error, match=message):
        odeadv.solve(toy().transformed(transform), BATCH, (0.0, 1.0), steps=2)


def test_a_transformed_costate_is_linear_between_nodes():
    field = toy().transformed(lambda nodes: nodes)
    for arguments, message in (
        ({"costate": "hermite"}, "'hermite' for"),
        ({"costate": "exact"}, "'exact' for"),
        ({"scheme": "strang-midpoint"}, "'exact' by scheme 'strang-midpoint' for"),
    ):
        with pytest.raises(ValueError, match=f"^costate: got {message} a transformed field.* costate='linear'"):
            odeadv.solve(field, BATCH, (0.0, 1.0), steps=2, **arguments)
    assert "transformed" in repr(field)


@pytest.mark.parametrize(("eta_I", "rtol"), [(0.9, 1e-2), (0.95, 1e-2), (1.05, 1e-2), (0.99, 1e-4), (0.95, 1e-8)])
def test_a_loose_tolerance_does_not_refuse_a_fixed_point_that_is_far_from_the_first_recording(eta_I, rtol):
    """x(T) = x0 e^(lam T) / (1 - eta I): large near eta I = 1, whatever the tolerance."""
    lam, x0 = 0.5, torch.ones(1, dtype=torch.float64)
    eta = eta_I * 2 * lam / (math.exp(2 * lam) - 1)
    field = odeadv.AdversarialField(lambda t, x: lam * x, lambda x: 0.5 * (x**2).sum(), eta=eta)
    sol = odeadv.solve(field, x0, (0.0, 1.0), steps=50, sweeps=odeadv.Converge(rtol=rtol), **ACCURATE)
    assert sol.xs[-1].item() == pytest.approx(math.exp(lam) / (1 - eta_I), rel=1e-2)
