"""What the attacks and the evaluation refuse, before any work is done; every message names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from odeadv.support.checks import number
from odeadv.support.isolation import version

_WRITES = "model: writes to its images; expected a new tensor (x = (x - mean) / std, nn.ReLU(inplace=False) as first)"


def radius(eps: object, norm: object = "linf") -> float:
    """``eps``; raises as `number`, and ValueError if an L-infinity ball would hold every image in [0, 1]."""
    found = number("eps", eps, least=0)
    if found > 1 and norm in ("linf", "Linf"):
        raise ValueError(f"eps: got {found:g}, expected at most 1 for images in [0, 1]; is it in units of 1/255?")
    return found


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


def check_labels(labels: object, n: int, device: torch.device | None = None, *, name: str = "labels") -> None:
    """TypeError unless an int64 tensor; ValueError unless (n,), on ``device`` (None: any) and nowhere negative."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: got {type(labels).__name__}, expected a torch.Tensor")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: got dtype {labels.dtype}, expected torch.int64 class indices")
    if labels.shape != (n,):
        raise ValueError(f"{name}: got shape {tuple(labels.shape)}, expected ({n},), one for each image")
    if device is not None and labels.device != device:
        raise ValueError(f"{name}: on device {labels.device}, expected that of the images, {device}")
    if labels.min() < 0:
        raise ValueError(f"{name}: got {int(labels.min())}, expected class indices >= 0")


def own_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of the first floating parameter of ``model``; ``default`` if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), default)


def answered(model: nn.Module, images: Tensor) -> object:
    """What ``model`` returns for ``images``; ValueError if it writes to them, or cannot take their dtype."""
    before = version(images)
    try:
        answer = model(images)
    except RuntimeError as error:
        # So torch refuses where a gradient is asked for.
        if str(error).startswith("a leaf Variable that requires grad is being used in an in-place operation"):
            raise ValueError(_WRITES) from error
        own = own_dtype(model, images.dtype)
        if own == images.dtype or "type" not in str(error):  # out of memory, say
            raise
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"images: got {images.dtype}, but the model has {own} and does not take them ({why}); "
            f"expected images.to({own}), or the model in {images.dtype}"
        ) from error
    if version(images) != before:
        raise ValueError(_WRITES)
    return answer


def check_classes(logits: object, n: int, highest_label: int) -> Tensor:
    """``logits``; TypeError unless a floating tensor, ValueError unless (n, classes) with all labels < classes."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: returned {type(logits).__name__}, expected a tensor of logits")
    if not logits.is_floating_point():
        raise TypeError(f"model: returned dtype {logits.dtype}, expected floating logits")
    if logits.ndim != 2 or len(logits) != n:
        raise ValueError(f"model: returned logits of shape {tuple(logits.shape)}, expected ({n}, classes)")
    if highest_label >= logits.shape[1]:
        raise ValueError(f"labels: got {highest_label}, expected class indices < {logits.shape[1]} (logits per image)")
    return logits


def check_logits(logits: object, n: int, highest_label: int) -> Tensor:
    """``logits``; raises as `check_classes`, and ValueError unless they are finite."""
    checked = check_classes(logits, n, highest_label)
    if not checked.isfinite().all():
        raise ValueError("model: returned logits that are not finite, so no attack on it can be trusted")
    return checked


def check_target(target: object, labels: Tensor) -> Tensor | None:
    """``target``; raises as `check_labels`, and ValueError if it is the label of some image."""
    if target is None:
        return None
    check_labels(target, len(labels), labels.device, name="target")
    assert isinstance(target, Tensor)
    same = int((target == labels).sum())
    if same:
        raise ValueError(f"target: got the label itself for {same} of {len(labels)} images, expected another class")
    return target


def check_generator(generator: object) -> torch.Generator:
    """``generator``; ValueError unless it is one, and not torch's global one."""
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: got {generator!r}, expected e.g. torch.Generator().manual_seed(0)")
    if any(generator is own for own in (torch.default_generator, *torch.cuda.default_generators)):
        raise ValueError(
            "generator: got torch's global one, whose state attacks put back, so that every call would draw the "
            "same; expected one of your own, e.g. torch.Generator().manual_seed(torch.initial_seed())"
        )
    return generator
