"""Grids with unequal steps, sub-cycling, and tableaus and sub-steps of a user."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import measured_order
from torch import Tensor

import odeadv
from odeadv.splitting._tableau import _order

X0 = torch.tensor([1.0, -0.5], dtype=torch.float64)


def forced(t: Tensor, x: Tensor) -> Tensor:
    return torch.cos(t) * x - 0.3 * x**3


SIZES, NODES = [0.1, 0.4, 0.2, 0.3], [0.0, 0.1, 0.5, 0.7, 1.0]


class TestGrids:
    @pytest.mark.parametrize("steps", [{"dt": SIZES}, {"dt": torch.tensor(SIZES)}, {"steps": NODES}])
    def test_steps_of_given_sizes_and_between_given_times(self, steps: dict[str, Any]) -> None:
        sol = odeadv.solve(forced, X0, (0.0, 1.0), substep="rk4", save_at="steps", **steps)
        assert torch.allclose(sol.ts, torch.tensor(NODES, dtype=torch.float64), atol=1e-7)
        x = X0
        for t0, t1 in pairwise(NODES):
            x = odeadv.solve(forced, x, (t0, t1), substep="rk4", steps=1).xs[-1]
        assert torch.allclose(sol.xs[-1], x, atol=1e-7)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_backward_the_sizes_have_either_sign(self, sign: float) -> None:
        sol = odeadv.solve(forced, X0, (1.0, 0.0), substep="rk4", dt=[sign * h for h in SIZES[::-1]], save_at="steps")
        assert torch.allclose(sol.ts, torch.tensor(NODES[::-1], dtype=torch.float64))

    def test_a_last_shorter_step(self) -> None:
        sol = odeadv.solve(forced, X0, (0.0, 1.0), substep="rk4", dt=0.3, clip_last=True, save_at="steps")
        same = odeadv.solve(forced, X0, (0.0, 1.0), substep="rk4", steps=[0.0, 0.3, 0.6, 0.3 * 3, 1.0], save_at="steps")
        assert torch.equal(sol.xs, same.xs)
        whole = odeadv.solve(forced, X0, (0.0, 1.0), substep="rk4", dt=0.25, clip_last=True)
        assert torch.equal(whole.xs, odeadv.solve(forced, X0, (0.0, 1.0), substep="rk4", dt=0.25).xs)

    def test_an_adversarial_field(self) -> None:
        field = odeadv.AdversarialField(forced, lambda x: x.square().sum(), 0.1)
        sol = odeadv.solve(field, X0, (0.0, 1.0), scheme="strang", dt=SIZES)
        assert sol.costate.grid.times == pytest.approx(NODES)
        assert torch.allclose(
            sol.xs[-1], odeadv.solve(field, X0, (0.0, 1.0), scheme="strang", steps=50).xs[-1], atol=0.2
        )

    @pytest.mark.parametrize(
        ("steps", "message"),
        [
            ({"dt": [0.5, 0.4]}, r"^dt: got 2 step sizes with the sum 0.9, expected the length of the span .* 1$"),
            ({"dt": [1.5, -0.5]}, r"^dt: got a step of size -0.5, expected sizes above 0"),
            ({"dt": [0.5, 0.0, 0.5]}, r"^dt: got a step of size 0, expected sizes above 0"),
            ({"dt": []}, r"^dt: got 0 step sizes"),
            ({"steps": [0.0, 0.5]}, r"^steps: got 0 to 0.5, expected times from 0 to 1, both ends included"),
            ({"steps": [0.0, 0.5, 0.5, 1.0]}, r"^steps: the times must be in the order of the solve"),
            ({"dt": 0.3}, r"^dt: 0\.3 does not divide the span .* clip_last=True"),
            ({"steps": 3, "clip_last": True}, r"^clip_last: got True without a step size"),
            ({"dt": "adaptive", "clip_last": True}, r"^clip_last: got True for adaptive steps"),
        ],
    )
    def test_steps_that_do_not_fit_are_refused(self, steps: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            odeadv.solve(forced, X0, (0.0, 1.0), **steps)


# ---- tableaus ----

TRIANGLE = ((), (1 / 2,), (0.0, 3 / 4))
SQUARE = [[0, 0, 0], [1 / 2, 0, 0], [0, 3 / 4, 0]]
BS3 = ("bogacki-shampine", 3, (0, 1 / 2, 3 / 4), TRIANGLE, (2 / 9, 1 / 3, 4 / 9))


class TestTableaus:
    def test_every_method_known_by_name_has_its_order(self) -> None:
        for name in odeadv.substep_names():
            method = odeadv.splitting.get_substep(name)
            if name != "exact":
                assert method.measure_order() == method.order, name

    def test_orders_above_four(self) -> None:
        """Gauss-Legendre of three stages has order 6."""
        r = 15**0.5
        matrix = (
            (5 / 36, 2 / 9 - r / 15, 5 / 36 - r / 30),
            (5 / 36 + r / 24, 2 / 9, 5 / 36 - r / 24),
            (5 / 36 + r / 30, 2 / 9 + r / 15, 5 / 36),
        )
        assert _order(matrix, (5 / 18, 4 / 9, 5 / 18)) == 6

    @pytest.mark.parametrize("matrix", [TRIANGLE, SQUARE])
    def test_a_tableau_of_a_user(self, matrix: Any) -> None:
        method = odeadv.RungeKutta(*BS3[:3], matrix, BS3[4])
        assert method.measure_order() == 3
        exact = odeadv.solve(forced, X0, (0.0, 1.0), steps=400, substep="rk4").xs[-1]

        def error(n: int) -> float:
            return float((odeadv.solve(forced, X0, (0.0, 1.0), steps=n, substep=method).xs[-1] - exact).norm())

        assert measured_order(error, (4, 8, 16)) == pytest.approx(3, abs=0.2)
        sol = odeadv.solve(forced, X0, (0.0, 1.0), steps=4, scheme=method)
        assert sol.scheme == "bogacki-shampine"
        assert torch.equal(sol.xs, odeadv.solve(forced, X0, (0.0, 1.0), steps=4, substep=method).xs)

    def test_an_order_that_is_declared_too_high(self) -> None:
        wrong = odeadv.RungeKutta("wrong", 4, *BS3[2:])
        with pytest.warns(odeadv.AccuracyWarning, match="substep: 'wrong' declares order 4, but has order 3"):
            odeadv.solve(forced, X0, (0.0, 1.0), steps=4, substep=wrong)

    @pytest.mark.parametrize(
        ("tableau", "message"),
        [
            (((0, 1), ((), (1,)), (1,)), "^weights: got .* for 2 nodes, expected as many, with the sum 1"),
            (((0, 1), ((), (1,)), (1, 1)), "^weights: got"),
            (((0, 1), ((), (0.5,)), (0.5, 0.5)), "^matrix: got the row .* with the sum 0.5, expected its node, 1"),
            (((0, 1), ((0,), (0.5, 0.5)), (0.5, 0.5)), "^matrix: got rows of lengths"),
            (((0, 1), ((0, 0), (0.5, 0.5)), (0.5, 0.5)), "^matrix: got numbers on or above the diagonal.*odeadv.DIRK"),
        ],
    )
    def test_what_is_not_an_explicit_tableau_is_refused(self, tableau: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            odeadv.RungeKutta("bad", 1, *tableau)


# ---- sub-cycling, and sub-steps under other names ----


class TestSubCycling:
    def test_one_operator_alone_takes_shorter_steps(self) -> None:
        cycled = odeadv.solve(forced, X0, (0.0, 1.0), steps=3, substep=odeadv.Nested("rk4", steps=4))
        assert torch.allclose(cycled.xs[-1], odeadv.solve(forced, X0, (0.0, 1.0), steps=12, substep="rk4").xs[-1])
        assert cycled.stats.evaluations == {"f": 48}
        assert cycled.order == 4

    def test_within_a_splitting(self) -> None:
        """Strang with the fast operator sub-cycled by RK4 approaches Strang with its exact flow."""
        spin = torch.tensor([[0.0, 9.0], [-9.0, 0.0]], dtype=torch.float64)
        fast = odeadv.Operator(lambda t, x: x @ spin, flow=lambda t, dt, x: x @ torch.matrix_exp(dt * spin))
        field = odeadv.SplitField(fast=fast, slow=forced)

        def end(method: Any) -> Tensor:
            return odeadv.solve(field, X0, (0.0, 1.0), steps=5, substep={"fast": method, "slow": "rk4"}).xs[-1]

        errors = [float((end(odeadv.Nested("rk4", steps=m)) - end("exact")).norm()) for m in (4, 8)]
        assert errors[1] < errors[0] / 12 < 1e-3

    def test_the_costate_by_a_composite_rule(self) -> None:
        field = odeadv.AdversarialField(forced, lambda x: x.square().sum(), 0.1)
        options: dict[str, Any] = {"steps": 3, "scheme": "strang", "costate": "hermite"}
        fine = {"f": "rk4", "costate": odeadv.Nested("midpoint", steps=200)}
        exact = odeadv.solve(field, X0, (0.0, 1.0), substep={"f": "rk4", "costate": "exact"}, **options)
        assert torch.allclose(odeadv.solve(field, X0, (0.0, 1.0), substep=fine, **options).xs, exact.xs, rtol=1e-6)

    def test_a_sub_step_that_does_not_split_has_no_inner_sub_step(self) -> None:
        with pytest.raises(ValueError, match="substep: got 'euler' next to 'rk4', which does not split"):
            odeadv.Nested("rk4", "euler")


def test_methods_of_torchdiffeq_as_objects_and_by_bare_names() -> None:
    def end(**how: Any) -> Tensor:
        return odeadv.solve(forced, X0, (0.0, 1.0), steps=2, **how).xs[-1]

    expected = end(substep="torchdiffeq:dopri5")
    for how in ("dopri5", odeadv.TorchDiffEq("dopri5")):
        assert torch.equal(end(substep=how), expected)
        assert torch.equal(end(scheme=how), expected)
    assert odeadv.splitting.get_substep("rk4") is odeadv.splitting.get_substep("RK4")  # ours, not torchdiffeq's
    assert isinstance(odeadv.splitting.get_substep("rk4"), odeadv.RungeKutta)
    with pytest.raises(ValueError, match=r"^substep: got 'dopri4', .*dopri8.*did you mean 'dopri8' or 'dopri5'"):
        end(substep="dopri4")
