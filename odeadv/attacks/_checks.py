"""What the attacks and the evaluation refuse, before any work is done; every message names the argument."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor, nn


def non_negative(name: str, value: object) -> float:
    """``value`` as a float; TypeError unless it is a real number, ValueError unless finite and >= 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number >= 0")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name}: got {value!r}, expected a finite number >= 0")
    return number


def positive_integer(name: str, value: object) -> int:
    """``value`` as an int; TypeError unless it is an integer, ValueError unless >= 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {value!r}, expected an integer >= 1")
    if value < 1:
        raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
    return int(value)


def check_model(model: object) -> None:
    """TypeError unless ``model`` is a module (only a module's modes and buffers can be put back)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")


def check_images(images: object) -> None:
    """TypeError unless a floating tensor; ValueError unless (n, ...) with n >= 1 and all values in [0, 1]."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: got {type(images).__name__}, expected a torch.Tensor")
    if not images.is_floating_point():
        raise TypeError(f"images: got dtype {images.dtype}, expected a floating dtype with values in [0, 1]")
    if images.ndim < 2 or images.numel() == 0:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (n, channels, height, width), not empty")
    low, high = (bound.item() for bound in torch.aminmax(images.detach()))
    if math.isnan(low) or math.isnan(high):
        raise ValueError("images: contain NaN, expected values in [0, 1]")
    if low < 0 or high > 1:
        raise ValueError(f"images: values in [{low}, {high}], expected [0, 1]; normalisation belongs inside the model")


def check_labels(labels: object, n: int, device: torch.device | None = None) -> None:
    """TypeError unless an int64 tensor; ValueError unless (n,), on ``device`` (None: any) and nowhere negative."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got {type(labels).__name__}, expected a torch.Tensor")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got dtype {labels.dtype}, expected torch.int64 class indices")
    if labels.shape != (n,):
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({n},), one for each image")
    if device is not None and labels.device != device:
        raise ValueError(f"labels: on device {labels.device}, expected that of the images, {device}")
    if labels.min() < 0:
        raise ValueError(f"labels: got {int(labels.min())}, expected class indices >= 0")


def check_logits(logits: object, n: int, highest_label: int) -> Tensor:
    """``logits``; TypeError unless a tensor, ValueError unless finite, (n, classes), and labels are < classes."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: returned {type(logits).__name__}, expected a tensor of logits")
    if logits.ndim != 2 or len(logits) != n:
        raise ValueError(f"model: returned logits of shape {tuple(logits.shape)}, expected ({n}, classes)")
    if highest_label >= logits.shape[1]:
        raise ValueError(f"labels: got {highest_label}, expected class indices < {logits.shape[1]} (logits per image)")
    if not logits.isfinite().all():
        raise ValueError("model: returned logits that are not finite, so no attack on it can be trusted")
    return logits
