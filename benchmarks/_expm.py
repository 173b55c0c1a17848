"""The exponential of a matrix, to the last digits."""

import math

import torch
from torch import Tensor


def matrix_exp(matrix: Tensor) -> Tensor:
    """exp of a square matrix, as exp(-1) exp(matrix + identity).

    torch's own for float64 has relative errors up to 2e-11 where the norm is between 0.005 and 0.05 (seen in 2.14.1),
    which orders above four would be limited by; around the identity it is right.
    """
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return math.exp(-1.0) * torch.linalg.matrix_exp(matrix + one)
