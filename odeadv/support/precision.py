"""Find out if a device computes in bfloat16 or only imitates it."""

from __future__ import annotations

import warnings

import torch


def bf16_is_native(device: torch.device) -> bool:
    """Return False for a CPU without instructions for bfloat16, such as one with AVX2 alone.

    Other devices, and versions of torch that cannot tell, count as native.
    """
    if device.type != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


def warn_of_imitated_bf16(argument: str, device: torch.device, instead: str) -> None:
    """Warn if torch imitates bfloat16 on ``device``, where it is about ten times slower than float32, not faster.

    Args:
        argument: the argument that asked for bfloat16.
        device: the device of the computation.
        instead: the value to choose instead.
    """
    if not bf16_is_native(device):
        warnings.warn(
            f"{argument}: 'bf16' is imitated on this CPU, which lacks instructions for bfloat16, and is many times "
            f"slower than {instead!r}; take {instead!r} here",
            RuntimeWarning,
            stacklevel=3,
        )
