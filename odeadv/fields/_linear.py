"""Linear operators dx/dt = A x, with right-hand side, exact flow and implicit solve. A is a matrix or a symbol."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from odeadv.support.checks import choice, integer, shown
from odeadv.support.isolation import is_wrapped, version

TransformName = Literal["fft", "dct"] | None
_NARROW = (torch.float16, torch.bfloat16)
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
# A linear operator keeps exp(dt A) for the last MOST step sizes. A step of a scheme of order eight has about as many.
MOST = 32


class Remembered:
    """Keeps values that depend on a tensor and a number, such as exp(dt A), for the last `MOST` numbers.

    Values are not kept if a gradient has to pass through them, nor in torch.func transforms of the tensor, nor under
    torch.compile. After a write to the tensor a value is computed again.

    Args:
        of: the tensor.
    """

    def __init__(self, of: Tensor) -> None:
        self._of = of
        self._values: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def __call__(self, make: Callable[[Tensor, Tensor], tuple[Tensor, ...]], number: Tensor, x: Tensor) -> Tensor:
        """Return the first result of ``make(number, x)``, see `all`."""
        return self.all(make, number, x)[0]

    def all(
        self, make: Callable[[Tensor, Tensor], tuple[Tensor, ...]], number: Tensor, x: Tensor
    ) -> tuple[Tensor, ...]:
        """Return all results of ``make(number, x)``. They must not depend on the values of ``x``."""
        graph = torch.is_grad_enabled() and (self._of.requires_grad or number.requires_grad)
        if graph or torch.compiler.is_compiling() or is_wrapped(self._of) or is_wrapped(number):
            return make(number, x)
        key = (make.__name__, float(number), version(self._of), x.dtype, x.device)
        if key not in self._values:
            if len(self._values) >= MOST:
                del self._values[next(iter(self._values))]
            with torch.inference_mode(False), torch.no_grad():
                self._values[key] = make(number, x)
        return self._values[key]


class Matrix:
    """The functions of dx/dt = A x for the last axis of the state, see `Operator.linear`."""

    def __init__(self, a: Tensor) -> None:
        _check_tensor("A", a)
        if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
            raise ValueError(f"A: got shape {tuple(a.shape)}, expected a square matrix (n, n), or (batch, n, n)")
        self.a = a
        self._kept = Remembered(a)

    def rhs(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity A x."""
        self._check(x)
        return _product(self.a.to(x.device, x.dtype), x)

    def flow(self, t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
        """Return exp(dt A) x. The exponential is kept for each step size."""
        self._check(x)
        return _product(self._kept(self._exponential, dt, x), x)

    def solve(self, t: Tensor, c: Tensor, b: Tensor) -> Tensor:
        """Return y with y - c A y = b. The factors of 1 - c A are kept for each c."""
        self._check(b)
        if b.dtype in _NARROW:  # torch cannot factorise matrices of 16 bits
            return self.solve(t, c, b.float()).to(b.dtype)
        factors, pivots = self._kept.all(self._factors, c, b)
        flat = factors.ndim == 2
        columns = b.reshape(-1, b.shape[-1]).mT if flat else b.unsqueeze(-1)
        y: Tensor = torch.linalg.lu_solve(factors, pivots, columns)
        return y.mT.reshape(b.shape) if flat else y.squeeze(-1)

    def _exponential(self, dt: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        # The dtype is the dtype of A, which may be more precise than the state. exp(M) is computed as e^-1 exp(M + 1):
        # torch 2.14.1 has relative errors of 2e-11 if the norm of M is between 0.005 and 0.05, but not if it is near 1.
        around = self.a * dt.to(self.a.device) + self._eye()
        return ((math.exp(-1.0) * torch.linalg.matrix_exp(around)).to(x.device, x.dtype),)

    def _factors(self, c: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.linalg.lu_factor_ex((self._eye() - self.a * c.to(self.a.device)).to(x.device, x.dtype))[:2])

    def _eye(self) -> Tensor:
        return torch.eye(self.a.shape[-1], dtype=self.a.dtype, device=self.a.device)

    def _check(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.a.shape[-1]:
            raise ValueError(
                f"A: got shape {tuple(self.a.shape)} for a state of shape {tuple(x.shape)}, expected a matrix for the "
                "last axis of the state"
            )
        _check_real("A", self.a, x)


class Diagonal:
    """The functions of dx/dt = T^-1 k T x with a transform T and a symbol k, see `Operator.diagonal`."""

    def __init__(self, k: Tensor, transform: TransformName, dims: int | None) -> None:
        _check_tensor("k", k)
        if transform is not None:
            choice("transform", transform, ("fft", "dct"))
        self.k, self.transform = k, transform
        if dims is None and transform is not None and k.ndim > 1:  # species of a line, or a plane?
            raise ValueError(
                f"dims: missing for a symbol of shape {tuple(k.shape)}, expected the number of its last axes that are "
                f"space: {k.ndim} transforms all of them, 1 is for several species on a line"
            )
        self.dims = k.ndim if dims is None else integer("dims", dims)
        if self.dims > k.ndim or (transform is not None and self.dims == 0):
            raise ValueError(f"dims: got {self.dims} for a symbol of shape {tuple(k.shape)}, expected at most {k.ndim}")
        self.axes = tuple(range(-self.dims, 0))
        self.symmetric = transform != "fft" or _is_symmetric(k.detach(), self.axes)
        self._zero = torch.zeros(())
        self._kept = Remembered(k)

    def rhs(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity T^-1 k T x."""
        return self._through(self._symbol, self._zero, x)

    def flow(self, t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
        """Return the exact flow T^-1 exp(k dt) T x."""
        return self._through(self._growth, dt, x)

    def solve(self, t: Tensor, c: Tensor, b: Tensor) -> Tensor:
        """Return y = T^-1 (1 - c k)^-1 T b, the solution of y - c T^-1 k T y = b."""
        return self._through(self._quotient, c, b)

    def _through(self, make: Callable[[Tensor, Tensor], tuple[Tensor, ...]], number: Tensor, x: Tensor) -> Tensor:
        self._check(x)
        if x.dtype in _NARROW:  # torch's Fourier transforms do not take 16 bits
            return self._through(make, number, x.float()).to(x.dtype)
        factor = self._kept(make, number, x)
        if self.transform is None:
            return factor * x
        if self.transform == "dct":
            return _cosine(_cosine(x, self.axes, forward=True) * factor, self.axes, forward=False)
        y: Tensor
        if x.is_complex():
            y = torch.fft.ifftn(torch.fft.fftn(x, dim=self.axes) * factor, dim=self.axes)
        else:
            y = torch.fft.irfftn(torch.fft.rfftn(x, dim=self.axes) * factor, s=x.shape[-self.dims :], dim=self.axes)
        return y

    def _symbol(self, number: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (self._fitting(self._of(x), x),)

    def _growth(self, dt: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (self._fitting(torch.exp(self._of(x) * dt.to(self.k.device)), x),)

    def _quotient(self, c: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (self._fitting(1 / (1 - self._of(x) * c.to(self.k.device)), x),)

    def _of(self, x: Tensor) -> Tensor:
        """Return the symbol for the state ``x``: half of its grid if ``x`` is real and T is a Fourier transform."""
        if self.transform != "fft" or x.is_complex():
            return self.k
        even = 0.5 * (self.k + _mirrored(self.k, self.axes).conj())
        return even[..., : self.k.shape[-1] // 2 + 1]

    @staticmethod
    def _fitting(factor: Tensor, x: Tensor) -> Tensor:
        """Return ``factor`` in the precision of ``x``. A real factor stays real."""
        real = x.real.dtype if x.is_complex() else x.dtype
        return factor.to(x.device, _COMPLEX[real] if factor.is_complex() else real)

    def _check(self, x: Tensor) -> None:
        if self.transform is not None and x.shape[-self.dims :] != self.k.shape[-self.dims :]:
            raise ValueError(
                f"k: got shape {tuple(self.k.shape)} for a state of shape {tuple(x.shape)}, expected the grid of the "
                f"last {self.dims} axes of the state; rfftfreq gives half a grid, fftfreq the whole of it"
            )
        if self.transform != "fft":
            _check_real("k", self.k, x)
        elif not self.symmetric and not x.is_complex():
            raise TypeError(
                "k: got a symbol that is not conjugate-symmetric, k(-w) = conj(k(w)), so a real state would become "
                f"complex; expected a complex state, for example {_COMPLEX[x.dtype]}"
            )


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if value.layout != torch.strided or not (value.is_floating_point() or value.is_complex()):
        raise TypeError(
            f"{name}: got {value.layout} of {value.dtype}, expected a dense floating or complex tensor; give a sparse "
            "matrix as Operator(lambda t, x: A @ x, solve=...)"
        )
    if not value.is_meta and not bool(value.detach().isfinite().all()):
        raise ValueError(f"{name}: got {shown(value)} with NaN or infinite entries, expected finite ones")


def _check_real(name: str, value: Tensor, x: Tensor) -> None:
    if value.is_complex() and not x.is_complex():
        raise TypeError(f"{name}: got {value.dtype} for a state of {x.dtype}, expected a complex state")


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    if matrix.ndim == 2:
        return x @ matrix.mT
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def _mirrored(k: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return k(-w) for the symbol k(w), on the frequencies w of the Fourier transform."""
    return torch.roll(torch.flip(k, axes), (1,) * len(axes), axes)


def _is_symmetric(k: Tensor, axes: tuple[int, ...]) -> bool:
    """Return True if k(-w) = conj(k(w)) at all frequencies w. For even sizes the highest frequency is not tested.

    At the highest frequency w and -w are the same point of the grid, so the symbol of an odd derivative cannot be
    symmetric there. The real part of the symbol is used, which is the usual choice.
    """
    off = (k - _mirrored(k, axes).conj()).abs() > 1e-6 * k.abs().amax()
    for axis in axes:
        n = k.shape[axis]
        if n % 2 == 0:
            off = off.index_fill(axis, torch.tensor([n // 2], device=k.device), False)
    return not bool(off.any())


def _cosine(x: Tensor, axes: tuple[int, ...], *, forward: bool) -> Tensor:
    """Return the discrete cosine transform of type II (not normalised) along ``axes``, or its inverse."""
    if x.is_complex():
        return torch.complex(_cosine(x.real, axes, forward=forward), _cosine(x.imag, axes, forward=forward))
    for axis in axes:
        last = x.movedim(axis, -1)
        x = (_cosine_last(last) if forward else _inverse_cosine_last(last)).movedim(-1, axis)
    return x


def _turn(x: Tensor) -> Tensor:
    n = x.shape[-1]
    return torch.polar(
        torch.ones(n, dtype=x.dtype, device=x.device),
        math.pi / (2 * n) * torch.arange(n, dtype=x.dtype, device=x.device),
    )


def _cosine_last(x: Tensor) -> Tensor:
    """Return the cosine transform along the last axis, by one Fourier transform (Makhoul 1980, IEEE ASSP 28)."""
    spectrum: Tensor = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1))
    return 2 * (spectrum * _turn(x).conj()).real


def _inverse_cosine_last(x: Tensor) -> Tensor:
    n = x.shape[-1]
    opposite = torch.cat([torch.zeros_like(x[..., :1]), x[..., 1:].flip(-1)], -1)
    v: Tensor = torch.fft.ifft(0.5 * torch.complex(x, -opposite) * _turn(x)).real
    order = torch.arange(n, device=x.device)
    place = torch.where(order % 2 == 0, order // 2, n - 1 - order // 2)
    return v[..., place]
