"""The other solvers on the Fisher-KPP problem; those that are not installed are left out."""

from collections.abc import Callable

import torch
from torch import Tensor

Solver = Callable[[], Tensor]
TOLERANCES = range(2, 11)


def torchdiffeq_solvers(whole: Callable[[Tensor, Tensor], Tensor], u0: Tensor, end: float) -> dict[str, Solver]:
    import torchdiffeq

    ends = torch.tensor([0.0, end], dtype=u0.dtype)

    def make(method: str, tolerance: float) -> Solver:
        return lambda: torchdiffeq.odeint(whole, u0, ends, method=method, rtol=tolerance, atol=tolerance)[-1]

    return {
        f"torchdiffeq {method}, tolerance 1e-{k}": make(method, 10.0**-k)
        for method, tolerances in (("bosh3", range(2, 6)), ("dopri5", TOLERANCES), ("dopri8", TOLERANCES))
        for k in tolerances
    }


def torchode_solvers(whole: Callable[[Tensor, Tensor], Tensor], u0: Tensor, end: float) -> dict[str, Solver]:
    try:
        import torchode
    except ImportError:
        return {}

    def make(method: str, tolerance: float) -> Solver:
        term = torchode.ODETerm(whole)
        step = getattr(torchode, method)(term=term)
        controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        solver = torchode.AutoDiffAdjoint(step, controller)
        t = torch.tensor([0.0], dtype=u0.dtype)
        problem = torchode.InitialValueProblem(y0=u0[None], t_start=t, t_end=t + end)
        return lambda: solver.solve(problem).ys[0, -1]

    return {f"torchode {method}, tolerance 1e-{k}": make(method, 10.0**-k) for method in ("Tsit5",) for k in TOLERANCES}


def diffrax_solvers(symbol: Tensor, u0: Tensor, end: float) -> dict[str, Solver]:
    """Compiled by jax before they are timed (warm)."""
    try:
        import diffrax
        import jax
        import jax.numpy as jnp
        import numpy
    except ImportError:
        return {}
    jax.config.update("jax_enable_x64", True)
    s, start, points = jnp.asarray(symbol.numpy()), jnp.asarray(u0.numpy()), len(u0)

    def diffuse(t, u, args):
        return jnp.fft.irfft(s * jnp.fft.rfft(u), n=points)

    def react(t, u, args):
        return u * (1 - u)

    def compiled(method: str) -> Callable:
        if method == "KenCarp4":
            terms = diffrax.MultiTerm(diffrax.ODETerm(react), diffrax.ODETerm(diffuse))
        else:
            terms = diffrax.ODETerm(lambda t, u, args: diffuse(t, u, args) + react(t, u, args))

        @jax.jit
        def solve(u, tolerance):
            solution = diffrax.diffeqsolve(
                terms,
                getattr(diffrax, method)(),
                0.0,
                end,
                None,
                u,
                stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
                max_steps=100_000,
            )
            return solution.ys[-1]

        return solve

    def make(solve: Callable, tolerance: float) -> Solver:
        return lambda: torch.from_numpy(numpy.array(solve(start, tolerance).block_until_ready()))

    return {
        f"diffrax {method} (warm), tolerance 1e-{k}": make(solve, 10.0**-k)
        # KenCarp4 takes seconds below 1e-6 here, where it is no contender.
        for method, solve, tolerances in (
            ("Tsit5", compiled("Tsit5"), TOLERANCES),
            ("KenCarp4", compiled("KenCarp4"), range(2, 7)),
        )
        for k in tolerances
    }
