"""Outcomes packed to one bit an example, as text."""

from __future__ import annotations

import base64
import binascii

import numpy
import torch
from torch import Tensor


def pack(outcomes: Tensor) -> str:
    """Base64 of ``outcomes``, bool of any shape in row-major order: eight to a byte, the first in the highest bit."""
    bits = numpy.packbits(outcomes.detach().cpu().reshape(-1).numpy())
    return base64.b64encode(bits.tobytes()).decode("ascii")


def unpack(text: object, *shape: int) -> Tensor:
    """The bool tensor of ``shape`` that `pack` made ``text`` from; ValueError if it is not one of that size."""
    count = 1
    for size in shape:
        count *= size
    try:
        if not isinstance(text, str):
            raise TypeError(f"got {type(text).__name__}")
        raw = numpy.frombuffer(base64.b64decode(text, validate=True), dtype=numpy.uint8)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"outcomes: {error}, expected base64 of packed bits") from None
    if len(raw) != (count + 7) // 8:
        raise ValueError(f"outcomes: got {len(raw)} bytes, expected {(count + 7) // 8} for {count} outcomes")
    return torch.from_numpy(numpy.unpackbits(raw, count=count).astype(bool)).reshape(shape)
