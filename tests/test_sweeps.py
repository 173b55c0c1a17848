"""Sweeps to convergence against closed forms; checkpoints; torch.func transforms."""

import math

import pytest
import torch
from conftest import measured_order
from torch import Tensor, nn

import odeadv

LAM, T = -0.7, 1.5
X0 = torch.tensor([1.3], dtype=torch.float64)
INTEGRAL = (math.exp(2 * LAM * T) - 1) / (2 * LAM)
A = torch.tensor([[-0.4, 1.1, 0.0], [-0.9, 0.2, 0.5], [0.3, 0.0, -0.8]], dtype=torch.float64)
Q = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
Y0 = torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64)
ACCURATE = {"scheme": "strang-symmetric", "substep": "rk4", "costate": "hermite"}


def scalar_field(eta: float) -> odeadv.AdversarialField:
    return odeadv.AdversarialField(lambda t, x: LAM * x, lambda x: 0.5 * (x**2).sum(), eta=eta)


def fixed_point_of_linear_problem(eta: float) -> Tensor:
    """x(T) of the two-point problem dx/dt = A x + eta a, da/dt = -A^T a, a(T) = Q x(T), by one matrix exponential."""
    top = torch.cat([A, eta * torch.eye(3, dtype=A.dtype)], dim=1)
    e = torch.linalg.matrix_exp(torch.cat([top, torch.cat([torch.zeros_like(A), -A.T], dim=1)]) * T)
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
    with pytest.raises(odeadv.SolveError, match=r"did not converge .*eta \* I = 1"):
        odeadv.solve(scalar_field(eta), sweeps=odeadv.Converge(memory=0), **problem)
    sol = odeadv.solve(scalar_field(eta), sweeps=odeadv.Converge(memory=0, most=20), throw=False, **problem)
    assert sol.status is odeadv.Status.NOT_CONVERGED
    assert sol.stats.residuals[-1] > 0.1
    assert bool(sol.xs[-1].isfinite())
    accelerated = odeadv.solve(scalar_field(eta), sweeps="converge", **problem)
    assert torch.allclose(accelerated.xs[-1], X0 * math.exp(LAM * T) / (1 - 1.7), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_there_is_no_fixed_point_none_is_returned(dtype):
    h = T / 4
    integral = sum(h * (1 + h * LAM) ** (2 * (3 - n)) for n in range(4))  # the discrete I of Lie with Euler
    field = scalar_field(1.0 / integral)
    sol = odeadv.solve(field, X0.to(dtype), (0.0, T), steps=4, scheme="lie", sweeps="converge", throw=False)
    assert sol.status is not odeadv.Status.SUCCESS


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
        (lambda: odeadv.Converge(most=1), r"^most, memory: got 1 and 5"),
        (lambda: odeadv.Converge(memory=-1), r"^most, memory: got 50 and -1"),
        (lambda: odeadv.Converge(most=2.5), r"^most, memory: got 2\.5 and 5"),
        (lambda: odeadv.Converge(rtol=math.inf), r"^rtol: got inf"),
        (lambda: odeadv.solve(scalar_field(0.1), X0, (0, T), steps=2, sweeps="forever"), r"^sweeps: got 'forever'"),
        (
            lambda: odeadv.solve(scalar_field(0.1), X0, (0, T), steps=2, sweeps="converge", differentiate_costate=True),
            r"^differentiate_costate: cannot be combined with sweeps='converge'",
        ),
        (
            lambda: odeadv.solve(scalar_field(0.1), X0, (0, T), steps=2, checkpoints=2, differentiate_costate=True),
            r"^checkpoints, differentiate_costate",
        ),
        (lambda: odeadv.solve(scalar_field(0.1), X0, (0, T), steps=2, checkpoints=0), r"^checkpoints: got 0"),
        (
            lambda: odeadv.solve(lambda t, x: -x, X0, (0, T), steps=2, checkpoints=2),
            r"^checkpoints: got 2 for a field without a loss",
        ),
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


def test_second_derivatives():
    field = odeadv.AdversarialField(lambda t, x: torch.tanh(A @ x), lambda x: 0.5 * x @ Q @ x, eta=0.3)

    def end(x0: Tensor) -> Tensor:
        return odeadv.solve(field, x0, (0.0, 1.0), steps=2, scheme="strang", differentiate_costate=True).xs[-1]

    assert torch.autograd.gradgradcheck(end, (Y0.clone().requires_grad_(),))
