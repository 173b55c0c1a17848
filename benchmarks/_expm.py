"""The exponential of a matrix, accurate to the last digits."""

import math

import torch
from torch import Tensor


def matrix_exp(matrix: Tensor) -> Tensor:
    """Return the exponential of a square matrix, computed as exp(-1) exp(matrix + identity).

    torch.linalg.matrix_exp in float64 has relative errors up to 2e-11 for norms between 0.005 and 0.05 (seen in torch
    2.14.1). These errors would hide the errors of schemes above order four. Near the identity it is accurate.
    """
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return math.exp(-1.0) * torch.linalg.matrix_exp(matrix + one)
