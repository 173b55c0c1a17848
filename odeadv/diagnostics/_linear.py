"""The time derivative of a layer, and the largest eigenvalue of a linear map."""

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
    """Return the time derivative f_t(t_n, x) of a layer that is an ODE step.

    It is computed by autograd and by finite differences. Autograd misses a dependence on time if the field converts its
    time to a Python number. If the two results differ by more than their errors, the finite difference is returned.
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
    if torch.equal(first, here) and torch.equal(second, here):  # the differences are too coarse to show a dependence
        return exact
    noise = 20.0 * torch.finfo(here.dtype).eps * norm(here) / abs(delta)
    return exact if norm(rate - exact) <= 0.05 * norm(rate) + noise else rate


def _clock(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32


class Eigenvalue(NamedTuple):
    """The result of `largest`.

    Attributes:
        modulus: ||A v|| for the map A and the last unit vector v. It estimates the modulus of the eigenvalue.
        rayleigh: v . A v, which has the sign of the eigenvalue.
        iterations: number of products with A.
        converged: True if A v equals ``rayleigh`` times v to the tolerance.
    """

    modulus: float
    rayleigh: float
    iterations: int
    converged: bool


def largest(apply: Callable[[Tensor], Tensor], start: Tensor, *, rtol: float, most: int) -> Eigenvalue:
    """Return the largest eigenvalue in modulus of a linear map A that is (nearly) self-adjoint, by power iteration.

    ||A v|| is a lower bound of ||A||. If the residual ||A v - (v . A v) v|| is at most rtol ||A v||, an eigenvalue is
    that close to v . A v. A single small residual is not enough: with many equal eigenvalues it occurs at once, and
    grows later with the component of a larger eigenvalue. So the iteration ends if the residual is small twice in a
    row, and not larger the second time. A constant estimate would not be a criterion, because it occurs at other
    eigenvectors too.
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
        # Residuals at the level of rounding errors may grow by chance, so growth at this level is accepted.
        settled = before <= rtol and (residual <= before * modulus or residual <= rounding * modulus)
        if modulus == 0.0 or settled:
            return Eigenvalue(modulus, rayleigh, count, True)
        v, before = image / modulus, residual / modulus
    return Eigenvalue(modulus, rayleigh, most, False)


def check_iteration(rtol: float, most: int) -> None:
    """Check the settings of a power iteration.

    Raises:
        TypeError, ValueError: if ``rtol`` is not a number above 0 and below 1, or ``most`` is not a positive integer.
    """
    if number("rtol", rtol, above=0.0) >= 1.0:
        raise ValueError(f"rtol: got {rtol!r}, expected a number below 1")
    integer("most", most)


def random_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal numbers of the shape of ``x``, equal on all devices. The default seed is 0."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    numbers: Tensor = torch.randn(x.shape, dtype=x.dtype, generator=generator, device=generator.device)
    return numbers.to(x.device)
