"""GMRES, for linear systems A x = b with a matrix A that is given by its products A v only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gmres(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    rtol: float,
    enough: float | None = None,
    restart: int = 40,
    most: int = 400,
) -> tuple[Tensor, bool, int]:
    """Solve A x = b by restarted GMRES (Saad and Schultz 1986, SIAM J. Sci. Stat. Comput. 7).

    For a right preconditioner M, pass the product with A M and multiply the result by M. The residual is then still
    the residual of A x = b.

    Args:
        product: ``product(v)`` returns A v, of the shape of ``v``.
        b: the right-hand side, a real vector.
        rtol: the norm of the residual to reach, as a fraction of the norm of ``b``.
        enough: the largest norm of the residual that still counts as solved, as a fraction of the norm of ``b``; by
            default twice ``rtol``.
        restart: largest number of basis vectors that are kept.
        most: largest number of products.

    Returns:
        The solution, True if its residual is small enough, and the number of products.
    """
    x, residual, products = torch.zeros_like(b), b, 0
    size = whole = float(b.norm())
    target = rtol * whole
    while size > target and products < most:
        basis, columns = [residual / size], list[Tensor]()
        for k in range(min(restart, most - products)):
            w = product(basis[-1])
            products += 1
            known = torch.stack(basis)
            h = known @ w
            w = w - h @ known
            again = known @ w  # a single orthogonalisation is too inexact: the basis would lose its orthogonality
            w = w - again @ known
            length = w.norm()
            columns.append(torch.cat([h + again, length[None]]))
            hessenberg, start = torch.zeros(k + 2, k + 1, dtype=torch.float64), torch.zeros(k + 2, dtype=torch.float64)
            for j, column in enumerate(columns):
                hessenberg[: j + 2, j] = column
            start[0] = size
            weights = torch.linalg.lstsq(hessenberg, start[:, None]).solution[:, 0]
            left = float((start - hessenberg @ weights).norm())
            if not left > target or not float(length) > 0.0:
                break
            basis.append(w / length)
        x = x + weights.to(b) @ torch.stack(basis[: len(weights)])
        before, residual = size, b - product(x)
        products += 1
        size = float(residual.norm())
        if not size < before:  # the residual stagnates or is NaN
            break
    return x, size <= (2.0 * rtol if enough is None else enough) * whole, products
