"""Adaptive steps: tolerances met, rejected steps, failures that leave the last good state."""

import math

import pytest
import torch
from torch import Tensor

import odeadv
from benchmarks._expm import matrix_exp

X0 = torch.tensor([1.0, -0.5], dtype=torch.float64)
B = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
C = torch.tensor([[0.2, 0.6], [0.1, -0.5]], dtype=torch.float64)


def split() -> odeadv.SplitField:
    return odeadv.SplitField(
        rotate=odeadv.Operator(lambda t, x: B @ x, flow=lambda t, dt, x: matrix_exp(B * dt) @ x),
        stretch=odeadv.Operator(lambda t, x: C @ x, flow=lambda t, dt, x: matrix_exp(C * dt) @ x),
    )


@pytest.mark.parametrize("span", [(0.0, 3.0), (3.0, 0.0)])
@pytest.mark.parametrize("scheme", ["strang", "aks3", "blanes-moan4"])
def test_the_error_follows_the_tolerance(scheme, span):
    exact = matrix_exp((B + C) * (span[1] - span[0])) @ X0
    errors, steps = [], []
    for tolerance in (1e-3, 1e-4, 1e-6):
        sol = odeadv.solve(
            split(), X0, span, scheme=scheme, substep="exact", dt="adaptive", rtol=tolerance, atol=tolerance
        )
        errors.append(float((sol.xs[-1] - exact).norm()))
        steps.append(sol.stats.steps)
        assert errors[-1] < tolerance * sol.stats.steps  # the tolerance bounds the error of a step
        assert sol.ts.tolist() == list(span)
    assert errors[2] < errors[1] < errors[0]
    assert steps[0] < steps[1] < steps[2]


@pytest.mark.parametrize("scheme", ["lie", "ruth3", "aks3"])
def test_palindromic_pairs_estimate_the_error_too(scheme):
    exact = matrix_exp((B + C) * 2.0) @ X0
    method = {"scheme": scheme, "substep": "exact"}
    for tolerance in (1e-3, 1e-5):
        settings = odeadv.Adaptive(rtol=tolerance, atol=tolerance, estimate="palindromic")
        sol = odeadv.solve(split(), X0, (0.0, 2.0), dt=settings, save_at="steps", **method)
        assert float((sol.xs[-1] - exact).norm()) < tolerance * sol.stats.steps
        n = sol.stats.steps // 2  # the estimate of a step against its true error
        h = float(sol.ts[n + 1] - sol.ts[n])
        step = odeadv.solve(split(), sol.xs[n], (0.0, h), steps=1, **method).xs[-1]
        adjoint = odeadv.schemes.get(scheme).adjoint()
        back = odeadv.solve(split(), sol.xs[n], (0.0, h), scheme=adjoint, steps=1, substep="exact").xs[-1]
        true = step - matrix_exp((B + C) * h) @ sol.xs[n]
        assert float((0.5 * (step - back) - true).norm()) < 0.2 * float(true.norm())


def test_what_palindromic_pairs_need():
    settings = odeadv.Adaptive(estimate="palindromic")
    with pytest.raises(ValueError, match=r"^estimate: 'palindromic' needs a scheme of odd order"):
        odeadv.solve(split(), X0, (0.0, 1.0), scheme="strang", substep="exact", dt=settings)
    with pytest.raises(ValueError, match=r"^estimate: 'palindromic' does not see the error of sub-steps"):
        odeadv.solve(split(), X0, (0.0, 1.0), scheme="lie", dt=settings)
    with pytest.raises(ValueError, match=r"^estimate: got 'milne'"):
        odeadv.Adaptive(estimate="milne")


def test_what_palindromic_pairs_need_is_said_before_a_recording():
    def never(t: Tensor, x: Tensor) -> Tensor:
        raise AssertionError

    settings = odeadv.Adaptive(estimate="palindromic")
    field = odeadv.AdversarialField(never, lambda x: (x**2).sum(), eta=0.1)
    with pytest.raises(ValueError, match=r"^estimate: 'palindromic' needs a scheme of odd order"):
        odeadv.solve(field, X0, (0.0, 1.0), scheme="strang", dt=settings)
    with pytest.raises(ValueError, match=r"^estimate: 'palindromic' does not see the error of sub-steps"):
        odeadv.solve(field, X0, (0.0, 1.0), scheme="lie", substep={"f": "rk4"}, dt=settings)
    still = odeadv.AdversarialField(lambda t, x: -x, lambda x: (x**2).sum(), eta=0.0)
    sol = odeadv.solve(still, X0, (0.0, 1.0), scheme="strang", dt=settings)  # nothing is split: doubling
    assert torch.equal(sol.xs, odeadv.solve(still, X0, (0.0, 1.0), scheme="lie", dt="adaptive").xs)


def test_adaptive_steps_inside_torch_func():
    def end(x0: Tensor, rate: float | Tensor = 1.0) -> Tensor:
        return odeadv.solve(lambda t, x: -rate * x, x0, (0.0, 1.0), dt="adaptive", substep="rk4").xs[-1]

    def never(t: Tensor, x: Tensor) -> Tensor:
        raise AssertionError

    batch = torch.ones(3, 2, dtype=X0.dtype)
    with pytest.raises(ValueError, match=r"^dt: adaptive decides by the values of states, which torch\.func\.vmap"):
        torch.func.vmap(lambda x0: odeadv.solve(never, x0, (0.0, 1.0), dt="adaptive").xs[-1])(batch)
    with pytest.raises(ValueError, match=r"^dt: adaptive decides by the values of states, which torch\.func\.vmap"):
        torch.func.vmap(lambda rate: end(X0, rate))(torch.ones(3, dtype=X0.dtype))
    gradient = torch.func.grad(lambda x0: end(x0).sum())(X0)
    assert torch.allclose(gradient, torch.full_like(X0, math.exp(-1.0)), rtol=1e-4)
    assert torch.allclose(torch.func.jacrev(end)(X0), math.exp(-1.0) * torch.eye(2, dtype=X0.dtype), rtol=1e-4)


def test_steps_follow_the_solution_and_rejections_are_counted():
    def f(t: Tensor, x: Tensor) -> Tensor:
        return -50.0 * torch.exp(-200 * (t - 0.7) ** 2) * x

    sol = odeadv.solve(f, X0, (0.0, 1.0), substep="midpoint", dt="adaptive", rtol=1e-5, atol=1e-9, save_at="steps")
    sizes = sol.ts.diff()
    assert float(sizes.max() / sizes.min()) > 10
    assert float(sol.ts[sizes.argmin()]) == pytest.approx(0.7, abs=0.2)
    assert sol.stats.rejected > 0
    area = 50 * math.sqrt(math.pi / 200) * 0.5 * (math.erf(0.3 * math.sqrt(200)) + math.erf(0.7 * math.sqrt(200)))
    assert torch.allclose(sol.xs[-1], X0 * math.exp(-area), rtol=2e-3)


def test_an_adversarial_field_with_adaptive_steps():
    lam, eta, end = -0.7, 0.3, 1.5
    integral = (math.exp(2 * lam * end) - 1) / (2 * lam)
    field = odeadv.AdversarialField(lambda t, x: lam * x, lambda x: 0.5 * (x**2).sum(), eta=eta)
    sol = odeadv.solve(
        field, X0, (0.0, end), scheme="strang-symmetric", substep="rk4", costate="hermite", dt="adaptive", rtol=1e-7,
        atol=1e-9,
    )  # fmt: skip
    assert torch.allclose(sol.xs[-1], X0 * math.exp(lam * end) * (1 + eta * integral), rtol=1e-5)
    assert sol.loss.isfinite()


def test_gradients_are_those_of_the_steps_taken():
    x0 = X0.clone().requires_grad_()
    settings = odeadv.Adaptive(rtol=1e-6, atol=1e-8)
    sol = odeadv.solve(split(), x0, (0.0, 1.0), scheme="strang", substep="exact", dt=settings)
    (gradient,) = torch.autograd.grad(sol.xs[-1].sum(), x0)
    assert torch.allclose(gradient, matrix_exp(B + C).T @ torch.ones(2, dtype=B.dtype), atol=1e-4)


def test_a_blow_up_leaves_the_last_good_state():
    def f(t: Tensor, x: Tensor) -> Tensor:
        return x**2

    problem = {"x0": X0.abs(), "t_span": (0.0, 2.0), "substep": "rk4", "dt": odeadv.Adaptive(smallest=1e-7)}
    with pytest.raises(odeadv.SolveError, match=r"below the smallest one.* to t = (0\.99|1)"):
        odeadv.solve(f, **problem)
    sol = odeadv.solve(f, **problem, throw=False)
    assert sol.status is odeadv.Status.STEP_TOO_SMALL
    assert 0.99 < float(sol.ts[-1]) < 1.01
    assert bool(sol.xs.isfinite().all())
    few = odeadv.solve(f, X0, (0.0, 0.9), dt=odeadv.Adaptive(rtol=1e-9, most=5), throw=False)
    assert few.status is odeadv.Status.TOO_MANY_STEPS
    never = odeadv.solve(lambda t, x: x * math.nan, X0, (0.0, 1.0), dt="adaptive", throw=False, save_at="steps")
    assert never.status is odeadv.Status.STEP_TOO_SMALL
    assert torch.equal(never.xs[0], X0)
    assert len(never.ts) == 1


def test_a_search_that_fails_early_still_gives_what_it_has():
    def square(t: Tensor, x: Tensor) -> Tensor:
        return x**2

    sol = odeadv.solve(
        square, X0.abs(), (0.0, 2.0), substep="rk4", dt=odeadv.Adaptive(smallest=1e-6), save_at=[0.5, 1.5], throw=False
    )
    assert sol.status is odeadv.Status.STEP_TOO_SMALL
    assert sol.ts[0] == 0.5
    assert len(sol.ts) == 2
    assert float(sol.ts[1]) == pytest.approx(1.0, abs=1e-3)
    nan = odeadv.Operator(lambda t, x: x * math.nan, flow=lambda t, dt, x: x * math.nan)
    adversarial = odeadv.AdversarialField(nan, lambda x: (x**2).sum(), eta=0.1)
    for field, arguments in (
        (odeadv.SplitField(a=nan, b=nan), {"substep": "exact"}),
        (adversarial, {}),
        (nan, {"save_at": [1.5, 2.0]}),
    ):
        sol = odeadv.solve(field, X0, (0.0, 2.0), dt="adaptive", throw=False, **arguments)
        assert sol.status is odeadv.Status.STEP_TOO_SMALL
        assert sol.ts.tolist() == [0.0]
        assert torch.equal(sol.xs[0], X0)


def test_the_order_of_a_field_that_is_not_split_is_that_of_its_substep():
    def f(t: Tensor, x: Tensor) -> Tensor:
        return torch.cos(5 * t) * x

    steps = {
        scheme: odeadv.solve(f, X0, (0.0, 2.0), scheme=scheme, substep="rk4", dt="adaptive", rtol=1e-7).stats.steps
        for scheme in ("lie", "strang", "rk4")
    }
    assert len(set(steps.values())) == 1
    coarse = odeadv.solve(f, X0, (0.0, 2.0), scheme="torchdiffeq:euler", dt="adaptive", rtol=1e-4)
    assert coarse.stats.steps == odeadv.solve(f, X0, (0.0, 2.0), scheme="euler", dt="adaptive", rtol=1e-4).stats.steps


def test_every_recording_has_steps_of_its_own():
    field = odeadv.AdversarialField(lambda t, x: torch.sin(4 * x), lambda x: 0.5 * (x**2).sum(), eta=3.0)
    method = {"substep": "rk4", "scheme": "strang-symmetric", "costate": "hermite", "sweeps": 2}
    exact = odeadv.solve(field, X0, (0.0, 2.0), steps=600, **method).xs[-1]
    found = odeadv.solve(field, X0, (0.0, 2.0), dt="adaptive", rtol=1e-6, atol=1e-8, **method).xs[-1]
    assert float((found - exact).norm() / exact.norm()) < 3e-4


def test_a_component_that_is_exactly_zero_needs_no_absolute_tolerance():
    x0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    sol = odeadv.solve(lambda t, x: -x, x0, (0.0, 1.0), substep="rk4", dt="adaptive", rtol=1e-8, atol=0.0)
    assert torch.allclose(sol.xs[-1], x0 * math.exp(-1.0), rtol=1e-6)


def test_pieces_within_a_field_within_a_field():
    from odeadv.fields import Piecewise

    pieces = Piecewise([odeadv.Operator(lambda t, x: x), odeadv.Operator(lambda t, x: -3.0 * x)], (0.0, 0.4, 1.0))
    inner = odeadv.SplitField(p=pieces, q=lambda t, x: 0.0 * x)
    field = odeadv.AdversarialField(inner, lambda x: (x**2).sum(), eta=0.0)
    sol = odeadv.solve(field, X0, (0.0, 1.0), dt="adaptive", rtol=1e-8, atol=1e-10, substep="rk4")
    assert torch.allclose(sol.xs[-1], X0 * math.exp(0.4 - 1.8), rtol=1e-5)
    with pytest.raises(ValueError, match=r"^dt: the step from 0\.25 to 0\.5 does not lie within one piece"):
        odeadv.solve(field, X0, (0.0, 1.0), dt=0.25)


def test_saved_times_and_gaps_in_a_piecewise_field():
    from odeadv.fields import Piecewise

    pieces = Piecewise([odeadv.Operator(lambda t, x: x), odeadv.Operator(lambda t, x: -3.0 * x)], (0.0, 0.4, 1.0))
    sol = odeadv.solve(
        pieces, X0, (0.0, 1.0), substep="rk4", dt="adaptive", rtol=1e-8, atol=1e-10, save_at=[0.2, 0.4, 0.77, 1.0]
    )
    exact = [math.exp(0.2), math.exp(0.4), math.exp(0.4 - 3 * 0.37), math.exp(0.4 - 1.8)]
    assert torch.allclose(sol.xs, torch.tensor(exact, dtype=X0.dtype)[:, None] * X0, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 3, "rtol": 1e-3}, r"^rtol, atol: got 0\.001 and None for fixed steps"),
        ({"dt": "adaptive", "rtol": -1.0}, r"^rtol: got -1, expected a finite number, at least 0"),
        ({"dt": "adaptive", "rtol": 0.0, "atol": 0.0}, r"^rtol, atol: got 0 and 0"),
        ({"dt": "adaptive", "steps": 3}, r"^dt, steps: got dt='adaptive' and steps=3"),
    ],
)
def test_bad_tolerances(arguments, message):
    with pytest.raises(ValueError, match=message):
        odeadv.solve(split(), X0, (0.0, 1.0), **arguments)
    with pytest.raises(ValueError, match=r"^first: got -1, expected a finite number, above 0"):
        odeadv.Adaptive(first=-1.0)
    with pytest.raises(ValueError, match=r"^first: got 0\.01, expected at least smallest"):
        odeadv.Adaptive(first=0.01, smallest=0.1)
    with pytest.raises(ValueError, match=r"^most: got 0"):
        odeadv.Adaptive(most=0)
    with pytest.raises(ValueError, match=r"^rtol, atol: given next to dt=odeadv.Adaptive"):
        odeadv.solve(split(), X0, (0.0, 1.0), dt=odeadv.Adaptive(), rtol=1e-3)
    net = odeadv.models.preact_resnet(8, 2)
    with pytest.raises(ValueError, match=r"^dt: adaptive steps need a field without jumps"):
        odeadv.solve(net.field(torch.rand(1, 3, 8, 8), torch.tensor([0])), dt="adaptive")


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)])
def test_a_smallest_step_above_the_first_trial_is_no_failure_where_larger_steps_will_do(span):
    loose = odeadv.Adaptive(rtol=0.1, atol=0.1, smallest=0.1)
    sol = odeadv.solve(lambda t, x: -x, X0, span, scheme="rk4", dt=loose)
    assert sol.status is odeadv.Status.SUCCESS
    factor = math.exp(span[0] - span[1])
    torch.testing.assert_close(sol.xs[-1], factor * X0, rtol=1e-2, atol=1e-2)
    far = odeadv.solve(lambda t, x: -x, X0, (1e6, 1e6 + 1e-6), scheme="rk4", dt="adaptive")
    assert far.status is odeadv.Status.SUCCESS
    with pytest.raises(odeadv.SolveError, match="below the smallest"):
        odeadv.solve(lambda t, x: x**2, X0, (0.0, 2.0), scheme="rk4", dt=odeadv.Adaptive(smallest=1e-3))


def test_adaptive_steps_of_a_splitting_may_contain_an_adaptive_method():
    """They control the error of the splitting, which torchdiffeq does not see."""
    field = odeadv.SplitField(a=lambda t, x: -x, b=lambda t, x: x.flip(0))
    x0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
    sol = odeadv.solve(field, x0, (0.0, 1.0), scheme="strang", substep="dopri5", dt="adaptive", rtol=1e-3, atol=1e-3)
    matrix = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(sol.xs[-1], torch.linalg.matrix_exp(matrix) @ x0, rtol=1e-2, atol=1e-2)
