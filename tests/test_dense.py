"""`sol(t)`: the state at any time."""

import math
from typing import Any

import pytest
import torch
from helpers import measured_order, seeded
from torch import Tensor, nn

import odeadv
from benchmarks._expm import matrix_exp
from odeadv.fields import Jump

X0 = torch.tensor([1.0, -0.5], dtype=torch.float64)
TIMES = torch.rand(7, generator=seeded(), dtype=torch.float64) * 1.5


def turning(t: Tensor, x: Tensor) -> Tensor:
    """Return dx/dt of exp(-0.3 t) times a rotation by sin(t)."""
    return torch.cos(t) * (x @ torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=x.dtype)) - 0.3 * x


def turned(t: Tensor) -> Tensor:
    """Return the solution of `turning` from X0."""
    c, s = torch.cos(torch.sin(t)), torch.sin(torch.sin(t))
    rotated = torch.stack([c * X0[0] + s * X0[1], c * X0[1] - s * X0[0]], dim=-1)
    return torch.exp(-0.3 * t)[..., None] * rotated


SPLIT = odeadv.SplitField(
    turn=lambda t, x: turning(t, x) + 0.3 * x,
    decay=odeadv.Operator(lambda t, x: -0.3 * x, flow=lambda t, dt, x: x * torch.exp(-0.3 * dt)),
)


@pytest.mark.parametrize(
    ("order", "field", "options"),
    [
        (1, turning, {"substep": "euler"}),
        (2, turning, {"substep": "midpoint"}),
        (4, turning, {"substep": "rk4"}),
        (2, SPLIT, {"scheme": "strang", "substep": {"turn": "midpoint", "decay": "exact"}}),
        (4, SPLIT, {"scheme": "yoshida4", "substep": "rk4"}),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_order_is_that_of_the_method(order: int, field: Any, options: dict[str, Any], sign: int) -> None:
    times = TIMES if sign > 0 else 1.5 - TIMES

    def error(n: int) -> float:
        x0 = X0 if sign > 0 else turned(torch.tensor(1.5, dtype=torch.float64))
        span = (0.0, 1.5) if sign > 0 else (1.5, 0.0)
        sol = odeadv.solve(field, x0, span, steps=n, dense=True, **options)
        return float((sol(times) - turned(times)).abs().max())

    assert measured_order(error, (8, 16, 32)) > order - 0.25


@pytest.mark.parametrize(
    ("scheme", "steps"),
    [("yoshida6", (4, 8)), ("blanes-moan6", (2, 4)), ("kahan-li8", (3, 6)), ("extrapolated-strang8", (2, 4))],
)
def test_the_order_of_schemes_above_four(scheme: str, steps: tuple[int, int]) -> None:
    """Steps are taken again up to the time, so these orders hold between steps too."""
    a, b = (torch.tensor(m, dtype=torch.float64) for m in ([[-0.6, 1.3], [-0.9, 0.2]], [[0.1, -0.8], [0.3, 0.4]]))
    field = odeadv.SplitField(a=odeadv.Operator.linear(a), b=odeadv.Operator.linear(b))
    exact = torch.stack([matrix_exp(t * (a + b)) @ X0 for t in TIMES])

    def error(n: int) -> float:
        sol = odeadv.solve(field, X0, (0.0, 1.5), scheme=scheme, steps=n, substep="exact", dense=True)
        return float((sol(TIMES) - exact).abs().max())

    assert measured_order(error, steps) > odeadv.schemes.get(scheme).order - 0.25


@pytest.mark.parametrize("substep", ["midpoint", "torchdiffeq:midpoint"])  # interpolated, and taken again
def test_times_of_any_form_give_the_states_of_save_at(substep: str) -> None:
    times = [0.0, 0.1, 0.5, 0.77, 1.0]
    saved = odeadv.solve(turning, X0, (0.0, 1.0), steps=4, substep=substep, save_at=times).xs
    sol = odeadv.solve(turning, X0, (0.0, 1.0), steps=4, substep=substep, dense=True)
    assert torch.allclose(sol(times), saved, rtol=1e-14, atol=0)
    assert torch.equal(torch.stack([sol(t) for t in times]), sol(torch.tensor(times, dtype=torch.float64)))
    assert torch.equal(sol([times[3:1:-1], times[:2]]), sol([0.77, 0.5, 0.0, 0.1]).reshape(2, 2, 2))
    assert torch.equal(sol(1.0), sol.xs[-1])
    assert sol([]).shape == (0, 2)
    assert torch.equal(sol.xs, odeadv.solve(turning, X0, (0.0, 1.0), steps=4, substep=substep).xs)


@pytest.mark.parametrize("substep", ["midpoint", "torchdiffeq:rk4"])
def test_gradients_by_states_and_times(substep: str) -> None:
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x0, t = X0.clone().requires_grad_(), torch.tensor([0.31, 0.5, 0.93], dtype=torch.float64, requires_grad=True)

    def at(weight: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return odeadv.solve(lambda t, x: weight * turning(t, x), x0, (0.0, 1.0), steps=5, substep=substep, dense=True)(
            t
        )

    # A step that is taken again has the derivative by t of the field, which differs from its own by the method's error.
    assert torch.autograd.gradcheck(at, (weight, x0, t), atol=1e-3 if substep != "midpoint" else 1e-8)


def test_adaptive_and_driven_solves() -> None:
    field = odeadv.AdversarialField(turning, lambda x: x.square().sum(), eta=0.05)
    options: dict[str, Any] = {"scheme": "strang", "substep": "midpoint", "rtol": 1e-4, "atol": 1e-6}
    sol = odeadv.solve(field, X0, (0.0, 1.5), dt="adaptive", dense=True, **options)
    saved = odeadv.solve(field, X0, (0.0, 1.5), dt="adaptive", save_at=TIMES.sort().values, **options)
    assert torch.allclose(sol(TIMES.sort().values), saved.xs, rtol=1e-12)
    fine = odeadv.solve(sol_field(field, sol), X0, (0.0, 1.5), steps=50, substep="rk4", save_at=TIMES.sort().values)
    assert torch.allclose(sol(TIMES.sort().values), fine.xs, atol=1e-3)


def sol_field(field: odeadv.AdversarialField, sol: odeadv.Solution) -> odeadv.VectorField:
    """Return the driven field of ``sol`` as one operator."""
    driven = field.driven_by(sol.costate)
    return odeadv.VectorField({"whole": lambda t, x: driven(t, x)})


def test_inside_a_jump_it_is_refused() -> None:
    decay = odeadv.Operator(lambda t, x: -x)
    field = odeadv.Piecewise([decay, Jump(lambda x: torch.cat([x, x])), decay], [0.0, 1.0, 2.0, 3.0])
    sol = odeadv.solve(field, X0, (0.0, 3.0), dt=1.0, substep="rk4", dense=True)
    assert sol(0.5).shape == (2,)
    assert sol([2.0, 2.5]).shape == (2, 4)
    with pytest.raises(ValueError, match=r"t: 1.5 lies within the jump from 1 to 2"):
        sol(1.5)
    with pytest.raises(ValueError, match="t: the states at these times differ in shape"):
        sol([0.5, 2.5])


def test_what_cannot_be_asked_is_refused_by_name() -> None:
    net = nn.Linear(2, 2).double()
    sol = odeadv.solve(lambda t, x: net(x), X0, (0.0, 1.0), steps=4, dense=True)
    with pytest.raises(ValueError, match=r"t: 1.5 is outside the solved span"):
        sol(1.5)
    with pytest.raises(TypeError, match=r"t: got torch.complex64, expected real times"):
        sol(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="t: got 'noon', expected real times"):
        sol("noon")
    with pytest.raises(ValueError, match=r"t: the steps were not kept; call the result of solve\(..., dense=True\)"):
        odeadv.solve(turning, X0, (0.0, 1.0), steps=4)(0.5)
    with torch.no_grad():
        net.weight.add_(1.0)
    with pytest.raises(ValueError, match="t: weights of the field have changed since the solve"):
        sol(0.5)


def test_states_solved_without_gradients_have_none() -> None:
    """Slopes with a graph between states without one would give a part of the gradient without a word."""
    net = nn.Linear(2, 2).double()
    with torch.no_grad():
        sol = odeadv.solve(lambda t, x: net(x), X0, (0.0, 1.0), steps=4, dense=True)
    assert not sol(0.3).requires_grad
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert math.isclose(sol(t).sum().item(), sol(0.3).sum().item())
