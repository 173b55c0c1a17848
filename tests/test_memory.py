"""`checkpoints`: the same result with less memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

import odeadv
from benchmarks._memory import peak_mebibytes

HEAT = odeadv.Operator(lambda t, x: -x, flow=lambda t, dt, x: x * torch.exp(-dt))


def squares(x: Tensor) -> Tensor:
    return x.square().sum()


def random_net() -> nn.Module:
    """Return a network whose evaluations draw random numbers and write to buffers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.3), nn.Tanh(), nn.Linear(3, 3)).double()


PROBLEMS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "plain": (lambda f: f, {"substep": "rk4"}),
    "mixture": (lambda f: odeadv.SplitField(f=f, g=lambda t, x: -(x**3)), {"scheme": "averaged-lie"}),
    "merged flows": (lambda f: odeadv.SplitField(f=f, heat=HEAT), {"substep": {"f": "midpoint", "heat": "exact"}}),
    "linear costate": (lambda f: odeadv.AdversarialField(f, squares, 0.1), {"scheme": "strang"}),
    "cubic costate": (lambda f: odeadv.AdversarialField(f, squares, 0.1), {"costate": "hermite", "sweeps": 2}),
}


@pytest.mark.parametrize("save_at", [None, "steps", (0.13, 0.6, 0.6, 1.0)])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_states_gradients_random_numbers_and_buffers_are_the_same_bit_for_bit(problem: str, save_at: Any) -> None:
    make, options = PROBLEMS[problem]
    x0 = torch.randn(5, 3, generator=seeded(), dtype=torch.float64)
    found = []
    for count in (None, 1, 3):
        net, x = random_net(), x0.clone().requires_grad_()
        torch.manual_seed(1)
        field = make(lambda t, x, net=net: net(x) * torch.cos(t))
        sol = odeadv.solve(field, x, (0.0, 1.0), steps=5, save_at=save_at, checkpoints=count, **options)
        weighed = sum(((n + 1) * x).sum() for n, x in enumerate(sol.xs))
        gradients = torch.autograd.grad(weighed, [x, *net.parameters()])
        found.append([sol.xs, torch.get_rng_state(), *gradients, *net.buffers()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_second_gradients_are_the_same_bit_for_bit() -> None:
    weights = torch.randn(3, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)
    found = []
    for count in (None, 4):
        sol = odeadv.solve(lambda t, x: torch.tanh(x @ weights), torch.eye(3).double(), (0.0, 1.0), steps=8,
                           substep="heun", checkpoints=count)  # fmt: skip
        (first,) = torch.autograd.grad(squares(sol.xs[-1]), weights, create_graph=True)
        found.append(torch.autograd.grad(squares(first), weights)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("problem", "share"), [("plain", 0.25), ("merged flows", 0.25), ("linear costate", 0.8), ("cubic costate", 0.8)]
)
def test_the_peak_of_a_solve_with_its_gradient_is_lower(problem: str, share: float) -> None:
    """A recording keeps two tensors per step, a state and a costate. The rest is proportional to 1 / segments."""
    make, options = PROBLEMS[problem]
    weights = torch.randn(16, 16, generator=seeded(), requires_grad=True)
    field, x0 = make(lambda t, x: torch.tanh(torch.tanh(x @ weights) @ weights)), torch.ones(64, 16)

    def peak(count: int | None) -> float:
        def gradient() -> None:
            sol = odeadv.solve(field, x0, (0.0, 1.0), steps=36, checkpoints=count, **options)
            torch.autograd.grad(squares(sol.xs[-1]), weights)

        return peak_mebibytes(gradient)

    assert peak(6) < share * peak(None)


def test_a_gradient_that_f_takes_itself_is_right() -> None:
    """A Hamiltonian field. Each of its gradients runs a part of its segment again."""

    def f(t: Tensor, x: Tensor) -> Tensor:
        y = x if x.requires_grad else x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(torch.cos(y).sum(), y, create_graph=True)[0]

    found = []
    for count in (None, 3):
        x0 = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
        sol = odeadv.solve(f, x0, (0.0, 1.0), steps=6, substep="midpoint", checkpoints=count)
        found += [sol.xs, torch.autograd.grad(squares(sol.xs[-1]), x0)[0]]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_gradients_taken_within_a_step_do_not_run_segments_again() -> None:
    """Implicit stages and cubic costates differentiate f on the way: each time, the segment would start anew."""
    x0 = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    implicit: dict[str, Any] = {"steps": 6, "substep": "sdirk2"}
    found = [odeadv.solve(lambda t, x: torch.sin(x) - 5 * x, x0, (0.0, 1.0), checkpoints=count, **implicit)
             for count in (None, 2)]  # fmt: skip
    assert found[0].stats == found[1].stats
    field = odeadv.AdversarialField(lambda t, x: torch.sin(x), squares, 0.1)
    found = [odeadv.solve(field, x0, (0.0, 1.0), steps=6, scheme="strang", costate="hermite", checkpoints=count)
             for count in (None, 2)]  # fmt: skip
    assert found[0].stats.vjps == found[1].stats.vjps
