"""`odeadv.solve` against closed forms: values, orders, gradients, bitwise identities, times."""

import copy
import functools
import math
import pickle
import re
import warnings

import pytest
import torch
from helpers import INTEGRAL, LAM, X0, Y0, A, Q, T, measured_order, scalar_field
from torch import Tensor

import odeadv
from benchmarks._expm import matrix_exp

pytestmark = pytest.mark.filterwarnings("ignore::odeadv.AccuracyWarning")

ETA = 0.3


def linear_field(eta: float = ETA) -> odeadv.AdversarialField:
    operator = odeadv.Operator(lambda t, x: A @ x, flow=lambda t, dt, x: matrix_exp(A * dt) @ x)
    return odeadv.AdversarialField(operator, lambda x: 0.5 * x @ Q @ x, eta=eta)


def linear_one_recording(eta: float = ETA) -> Tensor:
    """x(T) where a(t) is the costate of the unperturbed trajectory: one matrix exponential."""
    a0 = matrix_exp(A.T * T) @ Q @ matrix_exp(A * T) @ Y0
    block = torch.cat(
        [torch.cat([A, eta * torch.eye(3, dtype=A.dtype)], dim=1), torch.cat([torch.zeros_like(A), -A.T], dim=1)]
    )
    return (matrix_exp(block * T) @ torch.cat([Y0, a0]))[:3]


# ---- the meanings of dL/dx(t) of spec section 1 ----


@pytest.mark.parametrize(
    ("recordings", "factor"),
    [
        ({}, 1 + ETA * INTEGRAL),
        ({"sweeps": 1}, 1 + ETA * INTEGRAL),
        ({"sweeps": 3}, sum((ETA * INTEGRAL) ** k for k in range(4))),
        ({"ascent": 1}, 1 + ETA * INTEGRAL),
        ({"ascent": 3}, (1 + ETA * INTEGRAL) ** 3),
    ],
)
@pytest.mark.parametrize("scheme", ["strang-symmetric", "strang"])
def test_meanings_of_the_costate(recordings, factor, scheme):
    sol = odeadv.solve(scalar_field(), X0, (0.0, T), scheme=scheme, steps=200, substep="rk4", **recordings)
    exact = X0 * math.exp(LAM * T) * factor
    assert torch.allclose(sol.xs[-1], exact, rtol=2e-5, atol=0)
    assert sol.stats.recordings == (recordings.get("sweeps") or recordings.get("ascent") or 1)


def test_eta_above_zero_raises_the_loss_and_below_lowers_it():
    loss = {eta: odeadv.solve(scalar_field(eta), X0, (0.0, T), steps=50).loss.item() for eta in (-0.3, 0.0, 0.3)}
    assert loss[-0.3] < loss[0.0] < loss[0.3]


# ---- measured orders: the table of spec section 2 ----


@pytest.mark.parametrize(
    ("scheme", "substep", "costate", "order"),
    [
        ("lie", "euler", None, 1),
        ("lie", {"f": "exact"}, None, 1),
        ("strang", "euler", None, 1),
        ("strang", {"f": "exact"}, None, 1),
        ("strang", {"f": "exact"}, "exact", 1),
        ("strang-midpoint", {"f": "exact"}, None, 1),
        ("strang-symmetric", "euler", None, 1),
        ("strang-symmetric", {"f": "midpoint"}, None, 2),
        ("strang-symmetric", {"f": "exact"}, None, 2),
        ("strang", "midpoint", None, 2),
        ("strang", {"f": "exact", "costate": "midpoint"}, None, 2),
        ("strang-midpoint", "midpoint", None, 2),
        ("strang", "rk4", "hermite", 2),
        ("euler", None, None, 1),
        ("midpoint", None, None, 2),
        ("heun", None, None, 2),
        ("rk4", None, "hermite", 4),
    ],
)
def test_order_on_the_adversarial_field(scheme, substep, costate, order):
    exact = linear_one_recording()

    def error(steps: int) -> float:
        sol = odeadv.solve(linear_field(), Y0, (0.0, T), scheme=scheme, steps=steps, substep=substep, costate=costate)
        return float((sol.xs[-1] - exact).norm())

    assert measured_order(error) == pytest.approx(order, abs=0.12)


def test_strang_has_a_smaller_constant_than_lie_at_the_same_order():
    exact = linear_one_recording()
    error = {}
    for scheme in ("lie", "strang"):
        sol = odeadv.solve(linear_field(), Y0, (0.0, T), scheme=scheme, steps=64, substep={"f": "exact"})
        error[scheme] = float((sol.xs[-1] - exact).norm())
    assert error["strang"] < 0.9 * error["lie"]


B = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
Z0 = torch.tensor([0.8, -0.4], dtype=torch.float64)


def three_operators() -> odeadv.SplitField:
    """Non-linear, non-commuting and time-dependent: decay with an exact flow, rotation, and a forced square."""

    def decay_flow(t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
        # dx/dt = -(1 + sin t) x
        return x * torch.exp(-(dt - torch.cos(t + dt) + torch.cos(t)))

    return odeadv.SplitField(
        rotation=lambda t, x: (1 + t) * (B @ x),
        square=lambda t, x: 0.3 * x**2 * torch.cos(t),
        decay=odeadv.Operator(lambda t, x: -(1 + torch.sin(t)) * x, flow=decay_flow),
    )


@functools.cache
def three_operators_reference(span: tuple[float, float]) -> Tensor:
    return odeadv.solve(three_operators(), Z0, span, scheme="rk4", steps=1000).xs[-1]


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0), (-0.5, 0.7)])
@pytest.mark.parametrize(
    ("scheme", "order", "decay"),
    [
        ("lie", 1, "rk4"),
        ("strang", 2, "rk4"),
        ("strang-symmetric", 2, "rk4"),
        ("lie", 1, "exact"),
        ("strang", 2, "exact"),
        ("strang-symmetric", 2, "exact"),
    ],
)
def test_order_on_three_time_dependent_operators(span, scheme, order, decay):
    field, exact = three_operators(), three_operators_reference(span)

    def error(steps: int) -> float:
        substep = {"rotation": "rk4", "square": "rk4", "decay": decay}
        sol = odeadv.solve(field, Z0, span, scheme=scheme, steps=steps, substep=substep)
        return float((sol.xs[-1] - exact).norm())

    assert measured_order(error) == pytest.approx(order, abs=0.12)


C = torch.tensor([[0.2, 0.6], [0.1, -0.5]], dtype=torch.float64)


def exact_flows() -> odeadv.SplitField:
    """Two operators that do not commute, one of them time-dependent, with exact flows."""

    def stretch(t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
        return matrix_exp(C * (dt + ((t + dt) ** 2 - t**2) / 2)) @ x

    return odeadv.SplitField(
        rotate=odeadv.Operator(lambda t, x: B @ x, flow=lambda t, dt, x: matrix_exp(B * dt) @ x),
        stretch=odeadv.Operator(lambda t, x: (1 + t) * (C @ x), flow=stretch),
    )


@functools.cache
def exact_flows_reference() -> Tensor:
    return odeadv.solve(exact_flows(), Z0, (0.0, 1.0), scheme="kahan-li8", steps=32, substep="exact").xs[-1]


@pytest.mark.parametrize("scheme", odeadv.schemes.names())
def test_order_of_every_scheme_in_solve(scheme):
    order = odeadv.schemes.get(scheme).order
    steps = {1: (16, 32, 64), 2: (16, 32, 64), 3: (16, 32, 64), 4: (8, 16, 32), 6: (4, 6, 8), 8: (2, 3, 4)}[order]

    def error(n: int) -> float:
        sol = odeadv.solve(exact_flows(), Z0, (0.0, 1.0), scheme=scheme, steps=n, substep="exact")
        return float((sol.xs[-1] - exact_flows_reference()).norm())

    assert measured_order(error, steps) == pytest.approx(order, abs=0.3 if order > 4 else 0.12)


def test_the_reference_of_the_last_test_is_right():
    brute = odeadv.solve(exact_flows(), Z0, (0.0, 1.0), scheme="rk4", steps=2000).xs[-1]
    assert torch.allclose(brute, exact_flows_reference(), rtol=0, atol=1e-13)


def test_flows_that_follow_one_another_across_steps_are_one():
    merged = odeadv.solve(exact_flows(), Z0, (0.0, 1.0), scheme="strang", steps=10, substep="exact")
    each = odeadv.solve(exact_flows(), Z0, (0.0, 1.0), scheme="strang", steps=10, substep="exact", save_at="steps")
    assert torch.allclose(merged.xs[-1], each.xs[-1], rtol=0, atol=1e-15)
    assert merged.stats.evaluations == {"rotate": 10, "stretch": 11}
    assert each.stats.evaluations == {"rotate": 10, "stretch": 20}
    euler = odeadv.solve(exact_flows(), Z0, (0.0, 1.0), scheme="strang", steps=10, substep="euler")
    assert euler.stats.evaluations == {"rotate": 10, "stretch": 20}  # merging would change Euler's result


def test_flows_are_one_between_the_times_that_are_saved():
    def solve(save_at):
        return odeadv.solve(exact_flows(), Z0, (0.0, 1.0), steps=8, substep="exact", save_at=save_at)

    end, each = solve(None), solve("steps")
    assert torch.equal(solve([1.0]).xs[-1], end.xs[-1])
    assert solve([1.0]).stats.evaluations == {"rotate": 8, "stretch": 9}
    some = solve([0.0, 0.5, 0.7, 1.0])  # a node, and a time within a step, which takes a part of that step more
    assert some.stats.evaluations == {"rotate": 9, "stretch": 14}
    assert some.xs.shape == (4, *Z0.shape)
    assert torch.allclose(some.xs[[0, 1, 3]], each.xs[[0, 4, 8]], rtol=0, atol=1e-15)
    inside = odeadv.solve(exact_flows(), each.xs[5], (0.625, 0.7), steps=1, substep="exact").xs[-1]
    assert torch.allclose(some.xs[2], inside, rtol=0, atol=1e-15)
    back = odeadv.solve(exact_flows(), end.xs[-1], (1.0, 0.0), steps=8, substep="exact", save_at=[0.5, 0.0])
    assert back.stats.evaluations == {"rotate": 8, "stretch": 10}
    assert torch.allclose(back.xs, each.xs[[4, 0]], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("scheme", "substep", "reversible", "message"),
    [
        ("strang", "euler", True, r"'strang' has order 2, but a sub-step has less \('rotate' by 'euler', 'stretch'"),
        ("yoshida4", None, True, None),
        ("kahan-li6", None, True, "'kahan-li6' has order 6, but a sub-step has less"),
        ("yoshida4", "rk4", False, "'yoshida4' runs the irreversible operator 'stretch' backward"),
        ("strang", None, True, None),
        ("strang", "midpoint", False, None),
        ("extrapolated-strang4", "rk4", False, None),
    ],
)
def test_what_keeps_a_scheme_from_its_order_is_said(scheme, substep, reversible, message):
    field = odeadv.SplitField(
        rotate=lambda t, x: B @ x, stretch=odeadv.Operator(lambda t, x: C @ x, reversible=reversible)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        odeadv.solve(field, Z0, (0.0, 1.0), scheme=scheme, steps=2, substep=substep)
    assert [w.category for w in caught] == ([odeadv.AccuracyWarning] if message else [])
    assert all(re.search(message, str(w.message)) and w.filename == __file__ for w in caught)


@pytest.mark.parametrize(("scheme", "warns"), [("strang-symmetric", False), ("strang", True)])
def test_a_costate_with_a_frozen_clock_needs_no_better_than_euler(scheme, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        odeadv.solve(linear_field(), Y0, (0.0, T), scheme=scheme, steps=2, substep={"f": "midpoint"})
    assert [w.category for w in caught] == ([odeadv.AccuracyWarning] if warns else [])


@pytest.mark.parametrize("scheme", [n for n in odeadv.schemes.names() if odeadv.schemes.get(n).symmetric])
def test_symmetric_schemes_are_inverted_by_stepping_back(scheme):
    field = exact_flows()
    there = odeadv.solve(field, Z0, (0.2, 1.2), scheme=scheme, steps=7, substep="exact").xs[-1]
    back = odeadv.solve(field, there, (1.2, 0.2), scheme=scheme, steps=7, substep="exact").xs[-1]
    assert torch.allclose(back, Z0, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("torchdiffeq:rk4", 4)]
)
def test_order_of_substeps_on_a_plain_callable(method, order):
    exact = math.exp(math.sin(1.0)) * X0

    def error(steps: int) -> float:
        sol = odeadv.solve(lambda t, x: torch.cos(t) * x, X0, (0.0, 1.0), substep=method, steps=steps)
        return float((sol.xs[-1] - exact).norm())

    assert measured_order(error) == pytest.approx(order, abs=0.15)


def test_an_adaptive_torchdiffeq_substep_in_a_split_field():
    field = odeadv.SplitField(a=lambda t, x: -0.4 * x, b=lambda t, x: -0.6 * x)
    sol = odeadv.solve(field, X0, (0.0, 1.0), steps=2, substep=odeadv.TorchDiffEq("dopri5", rtol=1e-9, atol=1e-11))
    assert torch.allclose(sol.xs[-1], X0 * math.exp(-1.0), rtol=1e-8)


def test_a_torchdiffeq_substep_without_its_method_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match=r"^substep: torchdiffeq lacks the method 'dopri6'; it has dopri8"):
        odeadv.TorchDiffEq("dopri6")


# ---- bitwise identities ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128, torch.bfloat16])
@pytest.mark.parametrize("scheme", [*odeadv.schemes.names(), "euler"])
@pytest.mark.parametrize("substep", ["euler", "rk4"])
def test_eta_zero_is_bitwise_the_unsplit_solve(dtype, scheme, substep):
    if scheme == "euler":
        scheme = substep
    x0 = torch.linspace(-1, 1, 5).to(dtype)

    def f(t: Tensor, x: Tensor) -> Tensor:
        return (x * x * 0.3 - x) * (1 + t).to(x.real.dtype)

    field = odeadv.AdversarialField(f, lambda x: (x * x.conj()).real.sum(), eta=0.0)
    plain = odeadv.solve(f, x0, (0.0, 1.0), substep=substep, steps=7).xs[-1]
    split = odeadv.solve(field, x0, (0.0, 1.0), scheme=scheme, substep=substep, steps=7).xs[-1]
    assert torch.equal(plain, split)


def test_plain_callable_is_the_textbook_loop():
    x = X0
    for n in range(10):
        x = x + 0.1 * torch.sin(torch.tensor(n * 0.1, dtype=torch.float64) + x)
    sol = odeadv.solve(lambda t, x: torch.sin(t + x), X0, (0.0, 1.0), scheme="euler", dt=0.1)
    assert torch.allclose(sol.xs[-1], x, rtol=0, atol=1e-15)


def test_lie_and_strang_are_eq_5_and_eq_8_on_a_toy():
    steps, dt = 6, 0.25

    def f(x: Tensor) -> Tensor:
        return torch.tanh(A @ x)

    xs = [Y0.clone().requires_grad_()]
    for _ in range(steps):
        xs.append(xs[-1] + dt * f(xs[-1]))
    a = torch.autograd.grad(0.5 * xs[-1] @ Q @ xs[-1], xs)
    lie, strang = Y0, Y0
    for n in range(steps):
        lie = lie + dt * f(lie)
        lie = lie + dt * ETA * a[n + 1]
        strang = strang + dt / 2 * ETA * a[n]
        strang = strang + dt * f(strang)
        strang = strang + dt / 4 * ETA * (a[n] + a[n + 1])
    field = odeadv.AdversarialField(lambda t, x: f(x), lambda x: 0.5 * x @ Q @ x, eta=ETA)
    for scheme, expected in (("lie", lie), ("strang", strang)):
        sol = odeadv.solve(field, Y0, (0.0, steps * dt), scheme=scheme, dt=dt)
        assert torch.allclose(sol.xs[-1], expected, rtol=0, atol=1e-15)
        assert torch.allclose(sol.loss, 0.5 * expected @ Q @ expected, rtol=1e-14)
        for n in range(steps + 1):
            assert torch.equal(sol.costate(n * dt), a[n])


class Asked(odeadv.Operator):
    """An operator whose steps cannot be prepared beforehand: the loop asks it for each step."""

    def velocity(self, t, x, cost):
        return super().velocity(t, x, cost)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("substep", ["euler", "midpoint", "heun", "rk4"])
@pytest.mark.parametrize("scheme", ["lie", "strang", "strang-symmetric", "blanes-moan4", "averaged-lie"])
def test_steps_prepared_beforehand_are_the_same_steps(scheme, substep, dtype):
    """Values, the times that operators see and counts, bit for bit; over many steps, backward, and adaptive ones."""

    def solved(kind: type, span: tuple[float, float], **arguments) -> tuple[list, odeadv.Solution]:
        seen = []

        def f(t: Tensor, x: Tensor) -> Tensor:
            seen.append((t.dtype, t.ndim, t.item()))
            return torch.cos(t) * x

        field = odeadv.SplitField(a=kind(f), b=kind(lambda t, x: x * x * t - x))
        x0 = torch.linspace(-1, 1, 3).to(dtype)
        return seen, odeadv.solve(field, x0, span, scheme=scheme, substep=substep, **arguments)

    many = 300 if dtype is torch.float64 else 30  # one step in 256 is watched
    for span, arguments in (
        ((0.1, 1.3), {"steps": many}),
        ((1.0, 0.0), {"steps": 7, "save_at": "steps"}),
        ((0.0, 1.0), {"steps": 7, "save_at": [0.3, 0.5, 1.0]}),
        ((0.0, 1.0), {"dt": "adaptive", "rtol": 1e-3}),
    ):
        seen, prepared = solved(odeadv.Operator, span, **arguments)
        expected, asked = solved(Asked, span, **arguments)
        assert seen == expected
        assert torch.equal(prepared.xs, asked.xs)
        assert prepared.stats == asked.stats


@pytest.mark.parametrize("substep", ["euler", "rk4"])
def test_prepared_steps_check_what_operators_return(substep):
    def writes(t: Tensor, x: Tensor) -> Tensor:
        return x.mul_(2.0) if t > 0.5 else -x

    for f, error, message in (
        (writes, ValueError, r"^f: modifies the state in place"),
        (lambda t, x: x[..., None] if t > 0.5 else -x, ValueError, r"^f: returned shape \(1, 1\)"),
        (lambda t, x: None if t > 0.5 else -x, TypeError, r"^f: returned NoneType"),
        (lambda t, x: x + 1j if t > 0.5 else -x, TypeError, r"^f: returned torch.complex128"),
    ):
        with pytest.raises(error, match=message):
            odeadv.solve(f, X0, (0.0, 1.0), steps=4, substep=substep)


# ---- the costate between its nodes ----


@pytest.mark.parametrize(("kind", "order"), [("linear", 2), ("exact", 3), ("hermite", 4)])
def test_order_of_the_costate_between_nodes(kind, order):
    """Local interpolation error of a(t) on a linear field with exact flow, for which the recorded nodes are exact."""
    t = 0.5 * T + 1e-9

    def error(steps: int) -> float:
        sol = odeadv.solve(
            linear_field(), Y0, (0.0, T), scheme="strang-symmetric", substep={"f": "exact"}, costate=kind, steps=steps
        )
        grid = T / steps
        time = (math.floor(t / grid) + 0.3) * grid
        exact = matrix_exp(A.T * (T - time)) @ Q @ matrix_exp(A * T) @ Y0
        return float((sol.costate(time) - exact).norm())

    assert measured_order(error) == pytest.approx(order, abs=0.25)


def test_the_exact_midpoint_beats_the_mean_of_theorem_3_2():
    exact = matrix_exp(A.T * (T - 0.5 * T / 8)) @ Q @ matrix_exp(A * T) @ Y0
    error = {}
    for scheme in ("strang", "strang-midpoint"):
        sol = odeadv.solve(linear_field(), Y0, (0.0, T), scheme=scheme, substep={"f": "exact"}, steps=8)
        error[scheme] = float((sol.costate(0.5 * T / 8) - exact).norm())
    assert error["strang-midpoint"] < 0.1 * error["strang"]


def test_costate_outside_the_span_is_refused():
    sol = odeadv.solve(scalar_field(), X0, (0.0, T), steps=4)
    with pytest.raises(ValueError, match=r"t: 1\.6 is outside the solved span, 0 to 1\.5"):
        sol.costate(1.6)


def test_costate_at_eta_zero_is_recorded_when_asked_for():
    sol = odeadv.solve(scalar_field(0.0), X0, (0.0, T), steps=64, substep="rk4")
    assert sol.stats.vjps == 0
    assert torch.allclose(sol.costate(0.0), X0 * math.exp(2 * LAM * T), rtol=1e-6)
    with pytest.raises(AttributeError, match="costate: the field lacks a loss"):
        _ = odeadv.solve(lambda t, x: -x, X0, (0.0, 1.0), steps=2).costate


def test_driven_by_the_costate_it_runs_in_torchdiffeq():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    sol = odeadv.solve(linear_field(), Y0, (0.0, T), substep="rk4", costate="hermite", steps=200)
    field = linear_field().driven_by(sol.costate)
    times = torch.tensor([0.0, T], dtype=torch.float64)
    end = torchdiffeq.odeint(field, Y0, times, method="rk4", options={"step_size": T / 100})[-1]
    assert torch.allclose(end, linear_one_recording(), atol=1e-6)


@pytest.mark.parametrize("recordings", [{}, {"sweeps": 2}, {"ascent": 2}, {"sweeps": "converge"}, {"checkpoints": 4}])
def test_an_adversarial_field_in_torchdiffeq_by_one_call(recordings):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    arguments = {"substep": "rk4", "scheme": "strang-symmetric", "costate": "hermite", "steps": 100, **recordings}
    field = odeadv.driven(linear_field(), Y0, (0.0, T), **arguments)
    times = torch.tensor([0.0, T], dtype=torch.float64)
    end = torchdiffeq.odeint(field, Y0, times, method="dopri5", rtol=1e-8, atol=1e-10)[-1]
    sol = odeadv.solve(linear_field(), Y0, (0.0, T), **arguments)
    assert float((end - sol.xs[-1]).norm() / end.norm()) < 1e-4
    if recordings in ({}, {"checkpoints": 4}):
        assert torch.allclose(end, linear_one_recording(), atol=1e-6)
    same = odeadv.solve(field, Y0, (0.0, T), steps=100, scheme="strang-symmetric", substep="rk4")
    assert torch.equal(same.xs[-1], sol.xs[-1])


def carrying(steps: int = 200, **kwargs) -> odeadv.AdversarialField:
    """The linear problem with its span and steps, and no initial state."""
    field = linear_field()
    return odeadv.AdversarialField(field.f, field.loss, field.eta, t_span=(0.0, T), steps=steps, **kwargs)


def test_driven_records_and_does_nothing_else():
    module = Normed()
    calls = []

    def f(t: Tensor, x: Tensor) -> Tensor:
        calls.append(float(t))
        return module(t, x)

    field = odeadv.AdversarialField(f, lambda x: (x**3).sum(), eta=0.1, x0=torch.eye(3), t_span=(0.0, 1.0), steps=4)
    before = torch.get_rng_state()
    odeadv.driven(field)
    assert len(calls) == 4
    assert int(module.norm.num_batches_tracked) == 0
    assert torch.equal(before, torch.get_rng_state())
    still = odeadv.driven(scalar_field(0.0), X0, (0.0, 1.0), steps=4)
    assert torch.equal(still(torch.tensor(0.3), X0), LAM * X0)


def test_driven_refuses_what_solve_refuses():
    with pytest.raises(TypeError, match=r"^field: got SplitField, expected an AdversarialField"):
        odeadv.driven(exact_flows(), Z0, (0.0, 1.0), steps=4)
    with pytest.raises(ValueError, match=r"^t_span: not given"):
        odeadv.driven(scalar_field())
    with pytest.raises(ValueError, match=r"^x0: not given"):
        odeadv.driven(scalar_field(), t_span=(0.0, 1.0), steps=3)
    with pytest.raises(odeadv.SolveError, match="did not converge"):
        odeadv.driven(scalar_field(3.0), X0, (0.0, T), steps=8, sweeps=odeadv.Converge(memory=0))
    with pytest.raises(odeadv.SolveError, match="NaN or infinite"):
        odeadv.driven(odeadv.AdversarialField(lambda t, x: x**9, sum_of_squares, 1.0), 99 * X0, (0.0, 9.0), steps=9)
    with pytest.raises(odeadv.SolveError, match="smallest one"):
        odeadv.driven(odeadv.AdversarialField(lambda t, x: x**2, sum_of_squares, 1.0), X0, (0.0, 9.0), dt="adaptive")


def test_driven_on_another_grid_and_beyond_the_end():
    torchdiffeq = pytest.importorskip("torchdiffeq")

    def field() -> odeadv.AdversarialField:
        return odeadv.AdversarialField(lambda t, x: 3 * torch.cos(4 * t) * x, lambda x: 0.5 * (x**2).sum(), eta=ETA)

    recorded = odeadv.solve(field(), X0, (0.0, 2.0), steps=400, scheme="strang-symmetric", substep="rk4")
    exact = odeadv.solve(field().driven_by(recorded.costate), X0, (0.0, 2.0), scheme="rk4", steps=400).xs[-1]
    for costate in (recorded.costate, lambda t: recorded.costate(t)):
        coarse = odeadv.solve(field().driven_by(costate), X0, (0.0, 2.0), scheme="rk4", steps=80).xs[-1]
        assert torch.allclose(coarse, exact, rtol=1e-3)
    times = torch.tensor([0.0, 2.0], dtype=torch.float64)
    adaptive = torchdiffeq.odeint(field().driven_by(recorded.costate), X0, times, method="dopri5", rtol=1e-5)
    assert torch.allclose(adaptive[-1], exact, rtol=1e-3)


# ---- times and output ----


def test_times_that_went_through_float32():
    f, x0 = (lambda t, x: -0.5 * x), X0.float()
    steps = odeadv.solve(f, x0, (0, 0.3), dt=0.1, save_at="steps")
    assert torch.equal(odeadv.solve(f, x0, (0, 0.3), dt=0.1, save_at=steps.ts).xs, steps.xs)
    nodes = odeadv.solve(f, x0, (0, 0.7), dt=0.1, scheme="euler", save_at=torch.linspace(0, 0.7, 8))
    assert nodes.stats.evaluations == {"f": 7}
    for dt, span in ((torch.tensor(0.1), (0, 1)), (0.1, torch.tensor([0.0, 0.3]))):
        assert odeadv.solve(f, x0, span, dt=dt).stats.steps in (3, 10)
    long = odeadv.AdversarialField(lambda t, x: -0.01 * x, lambda x: (x**2).sum(), eta=1e-3)
    sol = odeadv.solve(long, x0, (0, 100.3), dt=0.1)
    assert torch.equal(sol.costate(torch.tensor(100.3)), sol.costate(100.3))


def test_saving_between_steps_changes_nothing_else():
    norm, dropout = torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5)

    def f(t: Tensor, x: Tensor) -> Tensor:
        return dropout(norm(x))

    finals, counts = [], []
    for save_at in (None, [0.3, 0.7]):
        norm.reset_running_stats()
        torch.manual_seed(0)
        sol = odeadv.solve(f, torch.eye(2), (0.0, 1.0), steps=4, save_at=[*(save_at or []), 1.0])
        finals.append(sol.xs[-1])
        counts.append(int(norm.num_batches_tracked))
    assert torch.equal(finals[0], finals[1])
    assert counts == [8, 8]


def test_saved_times_and_dense_output():
    sol = odeadv.solve(scalar_field(), X0, (0.0, 1.0), steps=5, save_at="steps")
    assert sol.xs.shape == (6, 1)
    assert torch.allclose(sol.ts, torch.linspace(0, 1, 6, dtype=torch.float64))
    times = [0.0, 0.2, 0.2, 0.33, 0.9, 1.0]
    picked = odeadv.solve(scalar_field(), X0, (0.0, 1.0), steps=5, save_at=times)
    assert torch.equal(picked.xs[0], X0)
    assert torch.equal(picked.xs[1], sol.xs[1])
    assert torch.equal(picked.xs[2], sol.xs[1])
    assert torch.equal(picked.xs[-1], sol.xs[-1])
    assert picked.ts.tolist() == pytest.approx(times)


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)])
def test_dense_output_is_of_fourth_order(span):
    def error(steps: int) -> float:
        sol = odeadv.solve(
            lambda t, x: torch.cos(t) * x, X0, span, substep="rk4", steps=steps, save_at=[0.5 + 0.3 / steps]
        )
        exact = X0 * math.exp(math.sin(0.5 + 0.3 / steps) - math.sin(span[0]))
        return float((sol.xs[0] - exact).norm())

    assert measured_order(error, (4, 8, 16, 32)) == pytest.approx(4, abs=0.3)


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize(("scheme", "order"), [("strang", 2), ("blanes-moan4", 4), ("blanes-moan6", 6)])
def test_dense_output_is_of_the_schemes_order(scheme, order, span):
    def error(steps: int) -> float:
        t = 0.5 + 0.3 / steps
        solve = functools.partial(odeadv.solve, exact_flows(), Z0, substep="exact")
        found = solve(span, scheme=scheme, steps=steps, save_at=[t]).xs[0]
        return float((found - solve((span[0], t), scheme="kahan-li8", steps=24).xs[-1]).norm())

    assert measured_order(error, (4, 8, 16) if order > 4 else (8, 16, 32)) == pytest.approx(order, abs=0.3)


def test_backward_in_time_undoes_forward():
    def f(t: Tensor, x: Tensor) -> Tensor:
        return torch.cos(t) * x

    there = odeadv.solve(f, X0, (0.0, 2.0), substep="rk4", steps=100).xs[-1]
    back = odeadv.solve(f, there, (2.0, 0.0), substep="rk4", dt=0.02).xs[-1]
    assert torch.allclose(back, X0, rtol=1e-8)


def test_a_saved_final_time_is_not_needed_for_loss_and_output():
    full = odeadv.solve(linear_field(), Y0, (0.0, T), steps=8)
    part = odeadv.solve(linear_field(), Y0, (0.0, T), steps=8, save_at=[0.0])
    assert torch.equal(full.loss, part.loss)
    assert part.xs.shape == (1, 3)


# ---- gradients ----


def test_gradient_with_the_costate_held_constant():
    x0 = Y0.clone().requires_grad_()
    sol = odeadv.solve(linear_field(), x0, (0.0, T), scheme="strang", steps=10)
    (gradient,) = torch.autograd.grad(sol.loss, x0)
    h, step = T / 10, torch.eye(3, dtype=A.dtype) + T / 10 * A
    assert h > 0
    final = sol.xs[-1].detach()
    assert torch.allclose(gradient, torch.linalg.matrix_power(step, 10).T @ Q @ final, rtol=1e-12)


@pytest.mark.parametrize("scheme", ["lie", "strang", "strang-midpoint"])
@pytest.mark.parametrize("recordings", [{}, {"sweeps": 2}, {"ascent": 2}])
def test_gradient_through_the_costate_is_that_of_the_whole_map(scheme, recordings):
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def solved(x0: Tensor, w: Tensor) -> Tensor:
        field = odeadv.AdversarialField(
            lambda t, x: torch.tanh(w * (A @ x)), lambda x: 0.5 * x @ Q @ x + (x**3).sum() / 6, eta=ETA
        )
        sol = odeadv.solve(field, x0, (0.0, T), scheme=scheme, steps=3, differentiate_costate=True, **recordings)
        return sol.xs[-1]

    assert torch.autograd.gradcheck(solved, (Y0.clone().requires_grad_(), weight))


def test_gradients_reach_parameters_and_no_grad_mode_is_respected():
    linear = torch.nn.Linear(3, 3).double()

    class Field(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x))

    field = odeadv.AdversarialField(Field(), lambda x: (x**2).mean(), eta=0.5)
    x0 = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sol = odeadv.solve(field, x0, (0.0, 1.0), steps=4)
    assert linear.weight.grad is None
    sol.loss.backward()
    assert linear.weight.grad is not None
    with torch.no_grad():
        quiet = odeadv.solve(field, x0, (0.0, 1.0), steps=4)
    assert not quiet.loss.requires_grad
    assert torch.equal(quiet.xs[-1], sol.xs[-1])
    with torch.inference_mode():
        inferred = odeadv.solve(field, x0.clone(), (0.0, 1.0), steps=4, scheme="strang-midpoint")
    assert inferred.status is odeadv.Status.SUCCESS


def test_the_value_does_not_depend_on_whether_a_gradient_is_asked_for():
    field = odeadv.AdversarialField(lambda t, x: torch.sin(x), lambda x: 0.5 * (x**2).sum(), eta=ETA)
    for recordings in ({}, {"sweeps": 2}, {"ascent": 2}):
        ends = [
            odeadv.solve(
                field, Y0.clone().requires_grad_(asked), (0.0, 1.0), steps=3, differentiate_costate=True, **recordings
            ).xs[-1]
            for asked in (False, True)
        ]
        assert torch.equal(*ends)
    x0 = Y0.clone().requires_grad_()
    anchored = odeadv.AdversarialField(lambda t, x: torch.sin(x), lambda x: ((x - x0) ** 2).sum(), eta=ETA)
    with_gradient = odeadv.solve(anchored, x0, (0.0, 1.0), steps=3, differentiate_costate=True).xs[-1]
    assert torch.equal(with_gradient, odeadv.solve(anchored, x0.detach(), (0.0, 1.0), steps=3).xs[-1])


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.norm(x)


normed_global = Normed()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        lambda m: m.forward,
        lambda m: functools.partial(m),
        lambda m: lambda t, x: m(t, x),
        lambda m: odeadv.Operator(m),
        lambda m: odeadv.Operator(lambda t, x: x, flow=lambda t, dt, x: m(t, x)),
        lambda m: odeadv.SplitField(a=m, b=lambda t, x: -x),
        lambda m: odeadv.SplitField(a=odeadv.SplitField(a=m, b=lambda t, x: x), b=lambda t, x: -x),
        lambda m: odeadv.Operator(odeadv.SplitField(a=m, b=lambda t, x: -x)),
    ],
)
def test_modules_are_found_wherever_they_are(wrap):
    module = Normed()
    operator = wrap(module)
    flows = isinstance(operator, odeadv.Operator) and operator.flow is not None
    field = odeadv.AdversarialField(operator, lambda x: (x**2).sum(), eta=0.1)
    x0 = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    odeadv.solve(field, x0, (0.0, 1.0), steps=4, scheme="lie", substep={"f": "exact" if flows else "euler"})
    assert int(module.norm.num_batches_tracked) == 4


def test_modules_named_globally_are_found():
    field = odeadv.AdversarialField(lambda t, x: normed_global(t, x), lambda x: (x**2).sum(), eta=0.1)
    odeadv.solve(field, torch.eye(3), (0.0, 1.0), steps=4, scheme="lie")
    assert int(normed_global.norm.num_batches_tracked) == 4


def test_the_callers_tensor_is_left_alone():
    x0 = Y0.clone()
    odeadv.solve(linear_field(), x0, (0.0, T), steps=3)
    assert not x0.requires_grad
    assert x0.grad is None
    assert torch.equal(x0, Y0)


def test_the_same_noise_in_recording_and_solve_and_the_random_state_of_an_unrecorded_solve():
    dropout = torch.nn.Dropout(0.5)
    draws = []

    def f(t: Tensor, x: Tensor) -> Tensor:
        mask = dropout(torch.ones_like(x))
        draws.append(mask)
        return -mask * x

    torch.manual_seed(3)
    field = odeadv.AdversarialField(f, lambda x: (x**2).sum(), eta=0.1, modules=[dropout])
    odeadv.solve(field, Y0, (0.0, 1.0), steps=4, scheme="lie")
    after = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(draws[:4], draws[4:], strict=True))
    torch.manual_seed(3)
    odeadv.solve(f, Y0, (0.0, 1.0), steps=4, scheme="euler")
    assert torch.equal(after, torch.get_rng_state())


# ---- statistics, status, repr ----


def test_statistics_count_what_was_done():
    calls = 0

    def f(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -x

    field = odeadv.AdversarialField(f, lambda x: (x**2).sum(), eta=0.1)
    sol = odeadv.solve(field, X0, (0.0, 1.0), steps=5, substep={"f": "rk4"}, sweeps=2)
    assert sol.stats.evaluations["f"] == calls == 3 * 5 * 4
    assert sol.stats.vjps == 2 * 5 * 4
    assert sol.stats.steps == 5
    calls = 0
    sol = odeadv.solve(field, X0, (0.0, 1.0), steps=5, scheme="strang-midpoint")
    assert sol.stats.evaluations["f"] == calls == 5 + 5 + 5
    assert sol.stats.vjps == 5 + 5
    assert "strang-midpoint" in repr(sol)
    assert "SUCCESS" in repr(sol)


def test_statistics_of_an_unsplit_solve_are_by_operator():
    field = odeadv.SplitField(a=lambda t, x: -0.4 * x, b=lambda t, x: -0.6 * x)
    assert odeadv.solve(field, X0, (0.0, 1.0), scheme="rk4", steps=3).stats.evaluations == {"a": 12, "b": 12}
    sol = odeadv.solve(scalar_field(), X0, (0.0, 1.0), scheme="euler", steps=4, sweeps=2)
    assert sol.stats.evaluations == {"f": 12, "costate": 8}
    assert sol.stats.vjps == 8


def test_statistics_of_a_field_within_a_field():
    inner = odeadv.SplitField(a=lambda t, x: -0.4 * x, b=lambda t, x: -0.6 * x)
    field = odeadv.AdversarialField(inner, lambda x: (x**2).sum(), eta=0.1)
    for _ in range(2):
        sol = odeadv.solve(field, X0, (0.0, 1.0), steps=5, scheme="lie")
        assert sol.stats.evaluations == {"f": 10, "costate": 5}
        assert sol.stats.vjps == 5


@pytest.mark.parametrize(("inner", "order"), [("lie", 1), ("strang", 2), ("blanes-moan4", 4)])
def test_a_split_field_within_a_split_field(inner, order):
    two = odeadv.SplitField(
        rotate=odeadv.Operator(lambda t, x: B @ x, flow=lambda t, dt, x: matrix_exp(B * dt) @ x),
        stretch=lambda t, x: (1 + t) * (C @ x),
    )
    field = odeadv.SplitField(pair=two, decay=odeadv.Operator(lambda t, x: -x, flow=lambda t, dt, x: x * (-dt).exp()))
    exact = exact_flows_reference() * math.exp(-1.0)
    nested = odeadv.Nested(inner, substep={"rotate": "exact", "stretch": "rk4"})

    def error(steps: int) -> float:
        sol = odeadv.solve(
            field, Z0, (0.0, 1.0), scheme="strang", steps=steps, substep={"pair": nested, "decay": "exact"}
        )
        return float((sol.xs[-1] - exact).norm())

    assert nested.order == order
    assert measured_order(error, (8, 16, 32)) == pytest.approx(order, abs=0.15)
    twice = odeadv.Nested(inner, substep={"rotate": "exact", "stretch": "rk4"}, steps=2)
    halves = odeadv.solve(field, Z0, (0.0, 1.0), steps=4, substep={"pair": twice, "decay": "exact"}).xs[-1]
    assert float((halves - exact).norm()) < error(4)


@pytest.mark.parametrize("outer", ["strang-symmetric", "strang"])
@pytest.mark.parametrize("steps", [1, 3])
def test_nested_exact_flows_keep_their_own_clock(outer, steps):
    def wave(t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
        return x * torch.exp((torch.sin(3 * (t + dt)) - torch.sin(3 * t)) / 3)

    inner = odeadv.SplitField(
        wave=odeadv.Operator(lambda t, x: torch.cos(3 * t) * x, flow=wave),
        rotate=odeadv.Operator(lambda t, x: B @ x, flow=lambda t, dt, x: matrix_exp(B * dt) @ x),
    )
    field = odeadv.SplitField(stretch=lambda t, x: C @ x, inner=inner)
    exact = odeadv.solve(field, Z0, (0.0, 1.0), scheme="rk4", steps=500).xs[-1]

    def error(n: int) -> float:
        substep = {"stretch": "rk4", "inner": odeadv.Nested(substep="exact", steps=steps)}
        return float(
            (odeadv.solve(field, Z0, (0.0, 1.0), scheme=outer, steps=n, substep=substep).xs[-1] - exact).norm()
        )

    assert measured_order(error) == pytest.approx(2, abs=0.12)


def test_nested_says_what_it_needs():
    with pytest.raises(ValueError, match=r"^steps: got 0"):
        odeadv.Nested(steps=0)
    field = odeadv.SplitField(pair=odeadv.SplitField(a=decay, b=decay), c=decay)
    with pytest.raises(ValueError, match=r"^substep: no inner operator is called 'd'; it has 'a', 'b'"):
        odeadv.solve(field, X0, (0.0, 1.0), steps=2, substep={"pair": odeadv.Nested(substep={"d": "rk4"})})
    with pytest.raises(ValueError, match=r"^substep: Nested with a scheme is for an operator that is a SplitField"):
        odeadv.solve(field, X0, (0.0, 1.0), steps=2, substep={"c": odeadv.Nested()})
    three = odeadv.Nested(odeadv.schemes.get("lie", 3))
    with pytest.raises(ValueError, match=r"^scheme: 'lie' splits 3 operators, the field has 2 \(a, b\)"):
        odeadv.solve(field, X0, (0.0, 1.0), steps=2, substep={"pair": three})


def test_plot_draws_states_and_costate(tmp_path):
    sol = odeadv.solve(linear_field(), Y0, (0.0, T), steps=8, save_at="steps")
    figure = sol.plot(most=2)
    figure.savefig(tmp_path / "solution.png")
    states, costates = figure.axes
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert states.lines[1].get_ydata()[3] == float(sol.xs[3, 1])
    assert costates.lines[0].get_ydata()[0] == float(sol.costate(0.0)[0])


def test_a_saved_state_that_is_not_finite_is_no_success():
    def f(t: Tensor, x: Tensor) -> Tensor:
        return x / (1 - t)

    sol = odeadv.solve(f, X0, (0.0, 1.0), steps=2, save_at=[0.0, 0.7, 1.0], throw=False)
    assert sol.status is odeadv.Status.NON_FINITE
    sol = odeadv.solve(lambda t, x: x**2, 5 * X0, (0.0, 3.0), steps=2, substep="torchdiffeq:dopri5", throw=False)
    assert sol.status is odeadv.Status.NON_FINITE


def test_states_held():
    plain = odeadv.solve(lambda t, x: -x, X0, (0.0, 1.0), steps=50)
    assert plain.stats.states_held == 2
    assert odeadv.solve(lambda t, x: -x, X0, (0.0, 1.0), steps=50, save_at="steps").stats.states_held == 51
    linear, exact = (odeadv.solve(scalar_field(), X0, (0.0, T), steps=50, costate=kind) for kind in ("linear", "exact"))
    assert linear.stats.states_held == exact.stats.states_held - 2 == 2 * 51
    assert len(linear.costate.states) == 0
    assert odeadv.solve(scalar_field(), X0, (0.0, T), steps=50, ascent=3).stats.states_held == 51 * (2 + 2)


def test_a_split_field_runs_unchanged_in_torchdiffeq():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    end = torchdiffeq.odeint(exact_flows(), Z0, times, method="dopri8", rtol=1e-11, atol=1e-12)[-1]
    assert torch.allclose(end, exact_flows_reference(), rtol=1e-9)


def test_divergence_is_never_a_success():
    def f(t: Tensor, x: Tensor) -> Tensor:
        return 1e200 * x**3

    with pytest.raises(odeadv.SolveError, match="NaN or infinite"):
        odeadv.solve(f, X0, (0.0, 1.0), steps=10)
    sol = odeadv.solve(f, X0, (0.0, 1.0), steps=10, throw=False)
    assert sol.status is odeadv.Status.NON_FINITE
    assert sol.status.message
    with pytest.raises(odeadv.SolveError):
        odeadv.solve(
            odeadv.AdversarialField(lambda t, x: -x, lambda x: (x / 0).sum(), eta=0.0), X0, (0.0, 1.0), steps=2
        )


# ---- errors: one line, naming the argument, before work ----


def sum_of_squares(x: Tensor) -> Tensor:
    return (x**2).sum()


def decay(t: Tensor, x: Tensor) -> Tensor:
    return -x


def works(**changes):
    arguments = {"field": scalar_field(), "x0": X0, "t_span": (0.0, 1.0), "steps": 4}
    arguments.update(changes)
    return odeadv.solve(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"field": 3}, TypeError, r"^field: got int"),
        ({"x0": None}, ValueError, r"^x0: not given"),
        ({"x0": [1.0]}, TypeError, r"^x0\[0\]: got float"),
        ({"x0": torch.tensor([1])}, TypeError, r"^x0: got dtype torch.int64"),
        ({"x0": torch.tensor([1.0, math.nan])}, ValueError, r"^x0: contains NaN"),
        ({"t_span": None}, ValueError, r"^t_span: not given"),
        ({"t_span": (0.0, 0.0)}, ValueError, r"^t_span: got \(0, 0\)"),
        ({"t_span": (0.0, math.inf)}, ValueError, r"^t_span: got inf"),
        ({"t_span": (0.0, 0.5, 1.0)}, ValueError, r"^t_span: got 3 values.*save_at"),
        ({"t_span": 1.0}, TypeError, r"^t_span: got float"),
        ({"t_span": ("a", "b")}, TypeError, r"^t_span: got 'a'"),
        ({"dt": 0.1}, ValueError, r"^dt, steps: got dt=0.1 and steps=4"),
        ({"steps": None}, ValueError, r"^dt: neither dt nor steps"),
        ({"steps": None, "dt": 0.3}, ValueError, r"^dt: 0\.3 does not divide.*\(steps=3\).*\(steps=4\)"),
        ({"steps": None, "dt": 2.0}, ValueError, r"^dt: 2 does not divide"),
        ({"steps": None, "dt": 0.0}, ValueError, r"^dt: got 0"),
        ({"steps": None, "dt": -0.5}, ValueError, r"^dt: got -0\.5 for a span that runs forward"),
        ({"steps": None, "dt": "small"}, TypeError, r"^dt: got 'small'"),
        ({"steps": 0}, ValueError, r"^steps: got 0"),
        ({"steps": 2.5}, TypeError, r"^steps: got 2\.5"),
        ({"scheme": "strung"}, ValueError, r"^scheme: got 'strung', expected one of .*; did you mean 'strang'"),
        ({"scheme": 3}, TypeError, r"^scheme: got int"),
        ({"scheme": "euler", "substep": "rk4"}, ValueError, r"^scheme: 'euler' is itself a sub-step"),
        ({"substep": "rk5"}, ValueError, r"^substep: got 'rk5', expected one of .*; did you mean 'rk4'"),
        ({"substep": {"g": "rk4"}}, ValueError, r"^substep: no operator is called 'g'; the field has 'f', 'costate'"),
        ({"substep": "exact"}, ValueError, r"^substep: 'exact' is asked for operator 'f', whose flow is not known"),
        ({"substep": 7}, TypeError, r"^substep: got int"),
        ({"costate": "cubic"}, ValueError, r"^costate: got 'cubic'"),
        ({"sweeps": 0}, ValueError, r"^sweeps: got 0"),
        ({"sweeps": 1.5}, TypeError, r"^sweeps: got 1\.5"),
        ({"sweeps": 1, "ascent": 1}, ValueError, r"^sweeps, ascent: got 1 and 1"),
        ({"save_at": "all"}, ValueError, r"^save_at: got 'all'"),
        ({"save_at": []}, ValueError, r"^save_at: got no times"),
        ({"save_at": [0.5, 0.2]}, ValueError, r"^save_at: the times must be in the order"),
        ({"save_at": [1.5]}, ValueError, r"^save_at: 1\.5 is outside"),
        ({"save_at": 0.5}, TypeError, r"^save_at: got 0\.5"),
        ({"sweeps": True}, TypeError, r"^sweeps: got True"),
        ({"field": decay, "sweeps": 2}, ValueError, r"^sweeps: got 2 for a field without a loss"),
        ({"steps": None, "dt": "0.5"}, TypeError, r"^dt: got '0\.5'"),
        ({"steps": None, "dt": 1e-320}, ValueError, r"^dt: 9\.9\d*e-321 would take"),
        ({"t_span": "01"}, ValueError, r"^t_span: got 0 values"),
        ({"substep": "torchdiffeq:dopri6"}, ValueError, r"^substep: torchdiffeq lacks the method 'dopri6'; it has"),
        ({"substep": odeadv.TorchDiffEq}, TypeError, r"^substep: got type"),
        ({"field": lambda t, x: x.mul_(2.0)}, ValueError, r"^f: modifies the state in place"),
        ({"field": lambda t, x: x.to(torch.complex128)}, TypeError, r"^f: returned torch.complex128 for a state of"),
        (
            {"field": odeadv.AdversarialField(decay, lambda x: x.relu_().sum(), eta=1.0)},
            ValueError,
            r"^loss: modifies the state in place",
        ),
        (
            {"field": odeadv.AdversarialField(decay, lambda x: x.sum(), eta=1.0, readout=torch.nn.ReLU(inplace=True))},
            ValueError,
            r"^readout: modifies the state in place",
        ),
        (
            {"field": odeadv.AdversarialField(decay, lambda x: x.sum() + 0j, eta=1.0)},
            TypeError,
            r"^loss: returned torch.complex128, expected a real scalar",
        ),
        (
            {"field": scalar_field().driven_by(lambda t: torch.ones(2, 1))},
            ValueError,
            r"^costate: returned shape \(2, 1\) for a state of shape \(1,\)",
        ),
        ({"field": lambda t, x: x[..., None]}, ValueError, r"^f: returned shape \(1, 1\) for a state of shape \(1,\)"),
        ({"field": lambda t, x: 0.0}, TypeError, r"^f: returned float"),
        (
            {"field": odeadv.AdversarialField(decay, lambda x: x**2 + torch.zeros(2), eta=1.0)},
            ValueError,
            r"^loss: returned shape \(2,\), expected a scalar",
        ),
        (
            {"field": odeadv.AdversarialField(decay, lambda x: 1.0, eta=1.0)},
            TypeError,
            r"^loss: returned float",
        ),
        (
            {"field": odeadv.AdversarialField(decay, lambda x: x.detach().sum(), eta=1.0)},
            ValueError,
            r"^loss: does not depend on the state",
        ),
        (
            {"scheme": odeadv.schemes.get("strang", operators=3)},
            ValueError,
            r"^scheme: 'strang' splits 3 operators, the field has 2",
        ),
        (
            {"scheme": odeadv.Scheme("half", (odeadv.Stage(0, 0.5, 0.0), odeadv.Stage(1, 1.0, 0.0)), 1, "test")},
            ValueError,
            r"^scheme: the weights of operator 0 in 'half' sum to 0\.5",
        ),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        works(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: odeadv.AdversarialField(3, sum, eta=1), TypeError, r"^f: got int"),
        (lambda: odeadv.AdversarialField(decay, 3, eta=1), TypeError, r"^loss: got int"),
        (lambda: odeadv.AdversarialField(decay, sum, eta="big"), TypeError, r"^eta: got 'big'"),
        (lambda: odeadv.AdversarialField(decay, sum, eta="0.1"), TypeError, r"^eta: got '0\.1'"),
        (lambda: odeadv.AdversarialField(decay, sum, eta=True), TypeError, r"^eta: got True"),
        (lambda: odeadv.AdversarialField(decay, sum, eta=math.nan), ValueError, r"^eta: got nan"),
        (lambda: odeadv.AdversarialField(decay, sum, eta=1, readout=3), TypeError, r"^readout: got int"),
        (lambda: odeadv.SplitField(a=decay), ValueError, r"^operators: got 1 \(a\)"),
        (lambda: odeadv.SplitField(a=decay, b=3), TypeError, r"^b: got int"),
        (lambda: odeadv.Operator(3), TypeError, r"^f: got int"),
        (lambda: odeadv.Operator(decay, flow=3), TypeError, r"^flow: got int"),
    ],
)
def test_bad_fields_are_refused_when_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_adversarial_field_outside_solve_says_what_to_do():
    advice = r"not a function of \(t, x\).*odeadv\.driven\(field, .*field\.driven_by\(solution\.costate\)"
    carrying = odeadv.AdversarialField(lambda t, x: -x, sum_of_squares, 0.1, x0=X0, t_span=(0.0, 1.0), steps=4)
    for field in (scalar_field(), carrying):
        with pytest.raises(TypeError, match=advice):
            field(torch.tensor(0.0), X0)


class TestStatesAndTimesOfOtherKinds:
    """What the flat loops of fixed steps must take, and what they must refuse."""

    @staticmethod
    def split() -> odeadv.SplitField:
        return odeadv.SplitField(a=lambda t, x: -x * (1 + t), b=lambda t, x: 0.5 * x)

    @pytest.mark.parametrize("scheme", ["euler", "midpoint", "rk4"])
    def test_a_state_made_in_inference_mode(self, scheme: str) -> None:
        with torch.inference_mode():
            x0 = torch.arange(1.0, 4.0)
        plain = odeadv.solve(lambda t, x: -x * t, x0.clone(), (0.0, 1.0), scheme=scheme, steps=300)
        made = odeadv.solve(lambda t, x: -x * t, x0, (0.0, 1.0), scheme=scheme, steps=300)
        assert torch.equal(made.xs[-1], plain.xs[-1])
        split = odeadv.solve(self.split(), x0, (0.0, 1.0), scheme="strang", steps=5).xs[-1]
        assert torch.equal(split, odeadv.solve(self.split(), x0.clone(), (0.0, 1.0), scheme="strang", steps=5).xs[-1])
        with torch.inference_mode():
            inside = odeadv.solve(self.split(), x0, (0.0, 1.0), scheme="strang", steps=5).xs[-1]
        assert torch.equal(inside, split)

    @pytest.mark.parametrize("substep", ["euler", "rk4"])
    def test_without_values(self, substep: str) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            end = odeadv.solve(self.split(), torch.ones(3), (0.0, 1.0), scheme="strang", steps=5, substep=substep).xs[
                -1
            ]
        assert end.shape == (3,)

    @pytest.mark.parametrize(("scheme", "substep"), [("strang", "euler"), ("lie", "rk4"), ("strang", "midpoint")])
    def test_a_field_that_writes_to_the_time(self, scheme: str, substep: str) -> None:
        def writes(t: Tensor, x: Tensor) -> Tensor:
            t *= 2
            return torch.sin(t) * x

        field = odeadv.SplitField(a=lambda t, x: -t * x, b=writes)
        with pytest.raises(ValueError, match=r"^f: modifies the time t in place"):
            odeadv.solve(field, torch.ones(2), (0.0, 1.0), scheme=scheme, steps=5, substep=substep)

    def test_times_are_those_of_each_evaluation(self) -> None:
        """Evaluations at equal times share a tensor, others do not; forward and backward in time."""
        for span in ((0.0, 1.0), (1.0, 0.0)):
            seen: list[tuple[str, float]] = []
            field = odeadv.SplitField(
                a=lambda t, x, seen=seen: seen.append(("a", float(t))) or -x,
                b=lambda t, x, seen=seen: seen.append(("b", float(t))) or x,
            )
            odeadv.solve(field, torch.ones(2, dtype=torch.float64), span, scheme="strang", steps=2, substep="rk4")
            sign, start = span[1] - span[0], span[0]
            expected = []
            for n in range(2):
                begin = start + sign * 0.5 * n
                halves = [("b", begin, 0.25), ("a", begin, 0.5), ("b", begin + sign * 0.25, 0.25)]
                for name, at, length in halves:
                    expected += [(name, at + sign * node * length) for node in (0.0, 0.5, 0.5, 1.0)]
            assert [name for name, _ in seen] == [name for name, _ in expected]
            assert [t for _, t in seen] == pytest.approx([t for _, t in expected])


# ---- stiff fields and other people's solvers as sub-steps ----


@pytest.mark.parametrize("scheme", ["lie", "strang", "extrapolated-strang4"])
def test_dense_output_of_exact_flows_is_as_good_as_a_step_however_stiff_the_field(scheme):
    """A Hermite polynomial through slopes of 1e4 would be off by hundreds."""
    rate = 1e4
    field = odeadv.SplitField(
        a=odeadv.Operator(lambda t, x: torch.ones_like(x), flow=lambda t, dt, x: x + dt),
        b=odeadv.Operator(lambda t, x: -rate * x, flow=lambda t, dt, x: x * torch.exp(-rate * dt)),
    )
    start, options = torch.ones(1, dtype=torch.float64), {"scheme": scheme, "substep": "exact"}
    dense = odeadv.solve(field, start, (0.0, 1.0), steps=10, save_at=[0.05, 0.53], **options).xs
    assert torch.equal(dense[0], odeadv.solve(field, start, (0.0, 0.05), steps=1, **options).xs[-1])
    assert bool((dense.abs() < 0.1).all())  # the solution is 1e-4, a step of Strang 0.025 off


@pytest.mark.parametrize(
    ("method", "most"), [("bosh3", 1e-5), ("fehlberg2", 1e-4), ("dopri5", 1e-10), ("dopri8", 1e-12)]
)
def test_adaptive_methods_of_torchdiffeq_end_where_a_stage_ends(method, most):
    """Interpolation at the end of a stage cost these methods at least two digits, and shorter stages made it worse."""
    field = odeadv.SplitField(a=lambda t, x: -x, b=lambda t, x: torch.cos(t) * x)
    start, exact = torch.ones(1, dtype=torch.float64), math.exp(math.sin(1.0) - 1.0)
    options = {"scheme": "kahan-li6", "substep": f"torchdiffeq:{method}", "steps": 16}
    assert odeadv.solve(field, start, (0.0, 1.0), **options).xs[-1].item() == pytest.approx(exact, abs=most)


def test_assertions_of_a_field_and_step_limits_of_torchdiffeq_are_not_taken_for_blow_up():
    def f(t: Tensor, x: Tensor) -> Tensor:
        assert x.shape[-1] == 7, "seven, please"
        return -x

    with pytest.raises(AssertionError, match="seven, please"):
        odeadv.solve(f, X0, (0.0, 1.0), steps=2, substep="torchdiffeq:dopri5")
    short = odeadv.TorchDiffEq("dopri5", options={"max_num_steps": 1})
    with pytest.raises(ValueError, match="substep: 'torchdiffeq:dopri5' needs more steps than its option"):
        odeadv.solve(lambda t, x: torch.sin(20 * t) * x, X0, (0.0, 10.0), steps=1, substep=short)


def test_solutions_and_failures_can_be_pickled_and_copied():
    w = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    field = odeadv.AdversarialField(lambda t, x: w * x, lambda x: (x**2).sum(), eta=0.1)
    sol = odeadv.solve(field, torch.ones(3, dtype=torch.float64), (0.0, 1.0), dt=0.25, save_at="steps")
    for again in (pickle.loads(pickle.dumps(sol)), copy.deepcopy(sol), pickle.loads(pickle.dumps(copy.copy(sol)))):
        assert all(torch.equal(getattr(again, name), getattr(sol, name)) for name in ("ts", "xs", "output", "loss"))
        assert not again.xs.requires_grad
        assert (again.status, again.stats, again.scheme) == (sol.status, sol.stats, sol.scheme)
        assert repr(again) == repr(sol)
        assert again.order == sol.order == 1
        with pytest.raises(AttributeError, match="not kept in copies"):
            again.costate  # noqa: B018
    assert sol.xs.requires_grad
    assert torch.equal(sol.costate.nodes[-1], sol.costate(1.0))  # the original has lost nothing
    with pytest.raises(odeadv.SolveError) as caught:
        odeadv.solve(lambda t, x: x * x, torch.ones(1, dtype=torch.float64), (0.0, 20.0), dt=0.1)
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value)
    assert torch.equal(error.solution.ts, caught.value.solution.ts)


def warned(*args, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        odeadv.solve(*args, **options)
    return [str(warning.message) for warning in caught if warning.category is odeadv.AccuracyWarning]


def test_irreversible_operators_are_seen_within_nested_fields_and_in_backward_spans():
    melt = odeadv.Operator(lambda t, x: -x, reversible=False)
    inner = odeadv.SplitField(u=melt, v=lambda t, x: torch.cos(t) * x)
    field = odeadv.SplitField(a=inner, b=lambda t, x: torch.sin(t) * x)
    span = {"x0": X0, "t_span": (0.0, 1.0), "steps": 2}
    found = warned(field, **span, scheme="yoshida4", substep="rk4")
    assert any("irreversible operator 'a'" in text for text in found)
    nested = {"a": odeadv.Nested("yoshida4", "rk4"), "b": "rk4"}
    found = warned(field, **span, scheme="strang", substep=nested)
    assert any("irreversible operator 'u'" in text for text in found)
    assert not warned(field, **span, scheme="strang", substep={"a": odeadv.Nested("strang", "rk4"), "b": "rk4"})
    found = warned(odeadv.SplitField(a=melt, b=field), X0, (1.0, 0.0), steps=2, substep="midpoint")
    assert any("t_span: (1.0, 0.0) runs backward" in text for text in found)


def test_orders_of_nested_and_multistep_substeps_are_not_overstated():
    inner = odeadv.SplitField(u=lambda t, x: -x, v=lambda t, x: torch.cos(t) * x)
    field = odeadv.SplitField(a=inner, b=lambda t, x: torch.sin(t) * x)
    span = {"x0": X0, "t_span": (0.0, 1.0), "steps": 2, "scheme": "yoshida4"}
    found = warned(field, **span, substep={"a": odeadv.Nested("yoshida4", {"u": "rk4"}), "b": "rk4"})
    assert any("'a' by 'nested yoshida4'" in text for text in found)  # v is left with the midpoint rule
    assert not warned(field, **span, substep={"a": odeadv.Nested("yoshida4", {"u": "rk4", "v": "rk4"}), "b": "rk4"})
    with pytest.raises(ValueError, match="no inner operator is called 'w'"):
        odeadv.solve(field, **span, substep={"a": odeadv.Nested("yoshida4", {"w": "rk4"})})
    plain = odeadv.SplitField(a=lambda t, x: -x, b=lambda t, x: torch.cos(t) * x)
    for method in ("explicit_adams", "implicit_adams", "fixed_adams"):
        options = {"scheme": "kahan-li6", "substep": f"torchdiffeq:{method}", "steps": 2}
        assert warned(plain, X0, (0.0, 1.0), **options)


def test_a_solution_can_be_shown_inside_vmap():
    shown = []

    def loss(x: Tensor) -> Tensor:
        sol = odeadv.solve(scalar_field(), x, (0.0, T), steps=3)
        shown.append(repr(sol))
        return sol.xs[-1]

    torch.func.vmap(loss)(torch.ones(3, 1, dtype=torch.float64))
    assert "UNKNOWN" in shown[0]
