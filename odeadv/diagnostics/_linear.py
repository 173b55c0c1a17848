"""Derivatives of a layer by time, and the largest eigenvalue of a linear map."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from odeadv.diagnostics._trajectory import Layer, inner, norm
from odeadv.support.checks import integer, number
from odeadv.support.linearised import gradient


def time_derivative(layer: Layer, x: Tensor) -> Tensor:
    """Return f_t(t_n, x) of a layer that is an ODE step: by autograd, unless differences show that a part is missing.

    Autograd misses the dependence on time if the field reads its time as a Python number.
    """
    state = x.detach()
    start = torch.as_tensor(layer.step.t0, dtype=_clock(state), device=state.device)
    t = start.clone().requires_grad_()
    y = layer.velocity(state, t)
    exact = torch.zeros_like(state)
    if y.requires_grad:
        probe = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, t, probe, create_graph=True, allow_unused=True)
        if pulled is not None and pulled.requires_grad:
            exact = gradient(pulled, probe, torch.ones_like(pulled))
    eps = torch.finfo(start.dtype).eps
    delta = eps ** (1.0 / 3.0) * max(1.0, abs(layer.step.t0))
    delta = min(delta, 0.25 * abs(layer.step.h)) * (1.0 if layer.step.h > 0 else -1.0)
    here = y.detach()
    first, second = (layer.velocity(state, start + k * delta).detach() for k in (1, 2))
    rate: Tensor = (4.0 * first - 3.0 * here - second) / (2.0 * delta)
    if torch.equal(first, here) and torch.equal(second, here):  # the dependence is below the differences' resolution
        return exact
    noise = 20.0 * torch.finfo(here.dtype).eps * norm(here) / abs(delta)
    return exact if norm(rate - exact) <= 0.05 * norm(rate) + noise else rate


def _clock(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32


class Eigenvalue(NamedTuple):
    """The result of `largest`.

    Attributes:
        modulus: ||A v|| of the last unit vector v, the estimate of the eigenvalue's modulus.
        rayleigh: v . A v, which has the eigenvalue's sign.
        iterations: number of products with A.
        converged: whether A v equals ``rayleigh`` times v to the tolerance.
    """

    modulus: float
    rayleigh: float
    iterations: int
    converged: bool


def largest(apply: Callable[[Tensor], Tensor], start: Tensor, *, rtol: float, most: int) -> Eigenvalue:
    """Return the largest eigenvalue in modulus of a linear map A that is (nearly) self-adjoint, by power iteration.

    ||A v|| is a lower bound of ||A||. The iteration ends if ||A v - (v . A v) v|| <= rtol ||A v||, because some
    eigenvalue is then that close. A constant estimate would be no criterion: it occurs at other eigenvectors too. A
    single small residual is none either: a vector among many equal eigenvalues has one at once, which then grows with
    the component of a larger eigenvalue. So the residual must be small twice, and not larger the second time.
    """
    rounding = 10.0 * torch.finfo(start.dtype).eps
    size = norm(start)
    v = start / size if size else start
    modulus = rayleigh = 0.0
    before = math.inf
    for count in range(1, most + 1):
        image = apply(v)
        modulus, rayleigh = norm(image), inner(v, image)
        residual = norm(image - rayleigh * v)
        # Rounding alone leaves residuals that may grow, but stay at its level.
        settled = before <= rtol and (residual <= before * modulus or residual <= rounding * modulus)
        if modulus == 0.0 or settled:
            return Eigenvalue(modulus, rayleigh, count, True)
        v, before = image / modulus, residual / modulus
    return Eigenvalue(modulus, rayleigh, most, False)


def check_iteration(rtol: float, most: int) -> None:
    """Reject settings of a power iteration.

    Raises:
        TypeError, ValueError: naming ``rtol``, which must lie within (0, 1), or ``most``.
    """
    if number("rtol", rtol, above=0.0) >= 1.0:
        raise ValueError(f"rtol: got {rtol!r}, expected a number below 1")
    integer("most", most)


def random_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal numbers shaped like ``x``, the same on every device; seed 0 without a generator."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    numbers: Tensor = torch.randn(x.shape, dtype=x.dtype, generator=generator, device=generator.device)
    return numbers.to(x.device)
