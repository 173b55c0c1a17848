"""Whether a device computes in bfloat16, or only imitates it."""

from __future__ import annotations

import warnings

import torch


def bf16_is_native(device: torch.device) -> bool:
    """False on a CPU without instructions for bfloat16, such as one with AVX2 alone.

    Other devices, and versions of torch that cannot tell, count as native.
    """
    if device.type != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


def warn_of_imitated_bf16(argument: str, device: torch.device, instead: str) -> None:
    """Say so where torch imitates bfloat16, which is some ten times slower than float32 rather than faster.

    Args:
        argument: that asked for it.
        device: it runs on.
        instead: what to take.
    """
    if not bf16_is_native(device):
        warnings.warn(
            f"{argument}: 'bf16' is imitated on this CPU, which has no instructions for bfloat16, and is many times "
            f"slower than {instead!r}; take {instead!r} here",
            RuntimeWarning,
            stacklevel=3,
        )
