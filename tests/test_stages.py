"""Grids of other than equal steps, sub-cycling, tableaus and sub-steps of a user."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import odeadv

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
