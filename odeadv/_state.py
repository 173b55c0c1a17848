"""Running a user's modules without leaving a trace: modes, buffers and random state come back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn

Mode = Literal["eval", "train", "unchanged"]


@contextlib.contextmanager
def untouched(*modules: nn.Module, mode: Mode = "unchanged") -> Iterator[None]:
    """Run the body on ``modules`` and put their modes and buffers back afterwards, exceptions included.

    Buffers (batch-norm running statistics among them) are swapped for copies inside the body, so the original
    tensors are never written: their values, identities and autograd versions stay what they were.
    ``requires_grad`` and ``.grad`` are not touched; use `torch.autograd.grad` in the body to keep it so.

    Args:
        modules: the modules to protect; one given twice (or inside another) is protected once.
        mode: ``"eval"`` or ``"train"`` sets every submodule's mode inside the body; ``"unchanged"`` sets none.
    """
    if mode not in ("eval", "train", "unchanged"):
        raise ValueError(f"mode: got {mode!r}, expected 'eval', 'train' or 'unchanged'")
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    saved = [(part, part.training, dict(part._buffers)) for part in parts]
    try:
        for part, _, buffers in saved:
            for name, buffer in buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.clone()
            if mode != "unchanged":
                part.training = mode == "train"
        yield
    finally:
        for part, training, buffers in saved:
            part._buffers.clear()
            part._buffers.update(buffers)
            part.training = training


@contextlib.contextmanager
def recording(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Differentiate inside, whatever the caller's grad mode; buffers and random state come back as they were."""
    index = device.index if device.index is not None else (torch.cuda.current_device() if device.type == "cuda" else 0)
    cuda = [index] if device.type == "cuda" else []
    with (
        untouched(*modules),
        torch.random.fork_rng(devices=cuda),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield
