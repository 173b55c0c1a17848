"""A split ODE: solve diffusion exactly and the reaction by RK4, and measure the order of each scheme.

python examples/split_ode.py
"""

import math

import torch

import odeadv

n = 64
k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
x = torch.linspace(0, 2 * math.pi, n + 1, dtype=torch.float64)[:-1]


def heat(t, h, u):
    """Solve du/dt = 0.1 u_xx exactly over a time h."""
    return torch.fft.ifft(torch.exp(-0.1 * k**2 * h) * torch.fft.fft(u)).real


def laplacian(t, u):
    """Return 0.1 u_xx."""
    return torch.fft.ifft(-0.1 * k**2 * torch.fft.fft(u)).real


field = odeadv.SplitField(diffusion=odeadv.Operator(laplacian, flow=heat), reaction=lambda t, u: u * (1 - u))
u0 = 0.5 + 0.4 * torch.sin(x)


def end(scheme, steps):
    """Return u at the end time t = 1."""
    options = {"substep": {"diffusion": "exact", "reaction": "rk4"}}
    return odeadv.solve(field, u0, (0.0, 1.0), scheme=scheme, steps=steps, **options).xs[-1]


if __name__ == "__main__":
    exact = end("yoshida4", 512)
    for scheme in ("lie", "strang", "yoshida4"):
        coarse, fine = ((end(scheme, steps) - exact).abs().max().item() for steps in (8, 16))
        print(f"{scheme:10} error {fine:.1e} with 16 steps, order {math.log2(coarse / fine):.2f}")
