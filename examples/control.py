"""Optimal control: a pendulum is held upright; near the top the answer agrees with the Riccati equation.

python examples/control.py
"""

import torch
from scipy.linalg import solve_continuous_are

import odeadv

PRICE = 0.1  # price of the torque u: the cost is the integral of (angle^2 + speed^2 / 10 + PRICE u^2) / 2
weight = torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64))
torque = torch.tensor([0.0, 1.0], dtype=torch.float64)  # the torque acts only on the speed


def pendulum(t, x):
    """Return dx/dt without torque, for x = (angle from the top, speed)."""
    return torch.stack([x[1], torch.sin(x[0]) - 0.1 * x[1]])


def linear(t, x):
    """Return dx/dt of the linear approximation near the top."""
    return torch.stack([x[1], x[0] - 0.1 * x[1]])


jacobian = torch.func.jacrev(lambda x: linear(0.0, x))(torch.zeros(2, dtype=torch.float64))
riccati = torch.from_numpy(solve_continuous_are(jacobian.numpy(), torque[:, None].numpy(), weight.numpy(), [[PRICE]]))


def controlled(f, x0, horizon):
    """Return the solution that minimises the cost: u = -a[1] / PRICE, where a is the costate, so eta = -1 / PRICE."""
    field = odeadv.AdversarialField(
        f,
        lambda x: 0.5 * x @ riccati @ x,  # the cost after the horizon
        eta=-torque / PRICE,
        running=lambda t, x: 0.5 * x @ weight @ x,
    )
    return odeadv.solve(
        field, x0, (0.0, horizon), scheme="rk4", costate="collocation", steps=32, sweeps="converge", save_at="steps"
    )


if __name__ == "__main__":
    x0 = torch.tensor([0.2, 0.0], dtype=torch.float64)
    solution = controlled(linear, x0, horizon=3.0)
    closed_loop = jacobian - torque[:, None] * (torque @ riccati)[None] / PRICE
    exact = torch.stack([torch.linalg.matrix_exp(t * closed_loop) @ x0 for t in solution.ts])
    print(f"linear: error of the state {(solution.xs - exact).abs().max().item():.1e}")
    print(f"        error of the costate {(solution.costate(0.0) - riccati @ x0).abs().max().item():.1e}")
    for angle in (0.2, 1.0):
        solution = controlled(pendulum, torch.tensor([angle, 0.0], dtype=torch.float64), horizon=1.0)
        first, feedback = -solution.costate(0.0)[1] / PRICE, -riccati[1, 0] * angle / PRICE
        print(f"pendulum from {angle}: first torque {first.item():.3f}, by linear feedback {feedback.item():.3f}")
