"""Find out if a device computes in bfloat16 or only imitates it."""

from __future__ import annotations

import warnings

import torch


def bf16_is_native(device: torch.device) -> bool:
    """Return False if ``device`` is a CPU without instructions for bfloat16, such as a CPU with AVX2 only.

    For other devices the result is True. It is also True if this version of torch does not have the test.
    """
    if device.type != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


def warn_of_imitated_bf16(argument: str, device: torch.device, instead: str) -> None:
    """Warn if torch only imitates bfloat16 on ``device``, which is about ten times slower than float32.

    Args:
        argument: the argument that asked for bfloat16.
        device: the device of the computation.
        instead: the value that the warning recommends.
    """
    if not bf16_is_native(device):
        warnings.warn(
            f"{argument}: 'bf16' is imitated on this CPU, which lacks instructions for bfloat16, and is many times "
            f"slower than {instead!r}; take {instead!r} here",
            RuntimeWarning,
            stacklevel=3,
        )
