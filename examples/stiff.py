"""A stiff equation: the Brusselator, two species that react and diffuse, by explicit and implicit methods.

python examples/stiff.py
"""

import math

import torch

import odeadv

points, diffusivity = 128, 0.02
place = (torch.arange(points, dtype=torch.float64) + 0.5) / points
waves = (math.pi * torch.arange(points, dtype=torch.float64)) ** 2
# Between reflecting ends the cosine transform makes u_xx diagonal. The largest eigenvalue here is 3000.
diffusion = odeadv.Operator.diagonal(-diffusivity * waves, transform="dct", reversible=False)


def react(t, x, feed=1.0, rate=3.0):
    """Return the reaction rates of the Brusselator; x has the shape (2, points)."""
    u, v = x
    join = u * u * v
    return torch.stack([feed - (rate + 1) * u + join, rate * u - join])


field = odeadv.SplitField(diffusion=diffusion, reaction=react)
x0 = torch.stack([1 + 0.5 * torch.cos(math.pi * place), 3 + torch.cos(2 * math.pi * place)])


def solve(steps, **options):
    """Return the solution up to t = 2, or the partial solution if the solve failed."""
    try:
        return odeadv.solve(field, x0, (0.0, 2.0), steps=steps, **options)
    except odeadv.SolveError as error:
        return error.solution


if __name__ == "__main__":
    exact = solve(256, scheme="extrapolated-strang4", substep={"diffusion": "exact", "reaction": "rk4"}).xs[-1]
    methods = {
        "rk4, not split": {"scheme": "rk4"},
        "sdirk2, not split": {"scheme": "sdirk2"},
        "strang, sdirk2 and midpoint": {"scheme": "strang", "substep": {"diffusion": "sdirk2", "reaction": "midpoint"}},
        "strang, exact and midpoint": {"scheme": "strang", "substep": {"diffusion": "exact", "reaction": "midpoint"}},
    }
    for name, options in methods.items():
        for steps in (16, 32):
            sol = solve(steps, **options)
            error = (sol.xs[-1] - exact).abs().max().item()
            cost = f"{sol.stats.solves} solves, {sol.stats.iterations} iterations"
            print(f"{name:28} {steps} steps: {sol.status.name}, error {error:.1e}, {cost}")
