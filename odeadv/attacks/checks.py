"""Checks of the arguments of attacks, before any work is done. Every message names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from odeadv.support.checks import TO_FLOAT, class_indices, number, shown
from odeadv.support.deferred import holds
from odeadv.support.isolation import version

_WRITES = "model: writes to its images; expected a new tensor (x = (x - mean) / std, nn.ReLU(inplace=False) as first)"

# So many image numbers are enough to find the images; more would fill the terminal.
_NUMBERS_SHOWN = 5


def radius(eps: object, norm: object = "linf") -> float:
    """Return ``eps`` as a float.

    Raises:
        TypeError: if ``eps`` is not a number.
        ValueError: if ``eps`` is negative or not finite, or above 1 in the L-infinity norm (the ball would then hold
            every image in [0, 1]).
    """
    found = number("eps", eps, least=0)
    if found > 1 and norm in ("linf", "Linf"):
        raise ValueError(f"eps: got {found:g}, expected at most 1 for images in [0, 1]; is it in units of 1/255?")
    return found


def lengths(name: str, value: object, images: Tensor, *, most: float | None = None) -> float | Tensor:
    """Return a length, or one length per image.

    Args:
        name: the argument's name, for the message.
        value: a number, or a tensor (n,).
        images: (n, ...).
        most: the largest length that is allowed; None allows every length.

    Returns:
        A float; or a float64 tensor (n, 1, ...) on the device of ``images``.

    Raises:
        TypeError: if ``value`` is not a number or a floating tensor.
        ValueError: if a length is negative, not finite or above ``most``, or the shape is not (n,).
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return number(name, value, least=0, most=most)
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a number, or a floating tensor with one per image")
    if value.shape != (len(images),):
        raise ValueError(
            f"{name}: got a tensor of shape {tuple(value.shape)}, expected a number or shape ({len(images)},)"
        )
    low, high = (bound.item() for bound in torch.aminmax(value.detach()))
    for bound in (low, high):
        number(name, bound, least=0, most=most)
    return value.detach().to(images.device, torch.float64).view(-1, *[1] * (images.ndim - 1))


def check_model(model: object, *, name: str = "model") -> None:
    """Raise TypeError unless ``model`` is a module: only the modes and buffers of modules can be restored."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: got {type(model).__name__}, expected a torch.nn.Module")


def check_images(images: object) -> None:
    """Check that ``images`` are a floating tensor (n, ...) with n >= 1 and values in [0, 1].

    Raises:
        TypeError: if ``images`` are not a floating tensor.
        ValueError: if the shape or a value is wrong.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: got {type(images).__name__}, expected a torch.Tensor")
    if not images.is_floating_point():
        raise TypeError(
            f"images: got dtype {images.dtype}, expected a floating dtype with values in [0, 1]; {TO_FLOAT}"
        )
    if images.ndim < 2 or images.numel() == 0:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (n, channels, height, width), not empty")
    lowest, highest = torch.aminmax(images.detach())
    if not holds((lowest >= 0) & (highest <= 1)):  # also False if a pixel is NaN
        low, high = float(lowest), float(highest)
        if math.isnan(low) or math.isnan(high):
            raise ValueError("images: contain NaN, expected values in [0, 1]")
        raise ValueError(
            f"images: got values in [{low:.3g}, {high:.3g}], expected [0, 1]; normalisation belongs inside the model"
        )


def check_labels(labels: object, n: int, device: torch.device | None = None, *, name: str = "labels") -> None:
    """Check that ``labels`` are a nonnegative int64 tensor (n,) on ``device`` (None: any device).

    Raises:
        TypeError: if ``labels`` are not an int64 tensor.
        ValueError: if the shape, the device or a value is wrong.
    """
    labels = class_indices(name, labels, n)
    if device is not None and labels.device != device:
        raise ValueError(f"{name}: got device {labels.device}, expected {device}, the device of the images")
    if not holds(labels.min() >= 0):
        raise ValueError(f"{name}: got {int(labels.min())}, expected class indices >= 0")


def own_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype of the first floating parameter of ``model``, or ``default`` if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), default)


def answered(model: nn.Module, images: Tensor) -> object:
    """Return ``model(images)``; raise ValueError if the model writes to its images or cannot take their dtype."""
    before = version(images)
    try:
        answer = model(images)
    except RuntimeError as error:
        # torch raises this if images that require a gradient are written to.
        if str(error).startswith("a leaf Variable that requires grad is being used in an in-place operation"):
            raise ValueError(_WRITES) from error
        own = own_dtype(model, images.dtype)
        if own == images.dtype or "type" not in str(error):  # the error has another cause, for example lack of memory
            raise
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"images: got {images.dtype}, but the model has {own} and does not take them ({why}); "
            f"expected images.to({own}), or the model in {images.dtype}"
        ) from error
    if version(images) != before:
        raise ValueError(_WRITES)
    return answer


def check_classes(logits: object, n: int, highest_label: int, *, name: str = "labels") -> Tensor:
    """Return ``logits`` if they have shape (n, classes), with at least two classes and a class for every label.

    Args:
        logits: what the model returned.
        n: the number of images.
        highest_label: the largest label.
        name: the argument that has the largest label, for the message.

    Raises:
        TypeError: if ``logits`` are not a floating tensor.
        ValueError: if the shape of ``logits`` is wrong.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: returned {type(logits).__name__}, expected a tensor of logits")
    if not logits.is_floating_point():
        raise TypeError(f"model: returned dtype {logits.dtype}, expected floating logits")
    if logits.ndim != 2 or len(logits) != n:
        raise ValueError(
            f"model: returned logits of shape {tuple(logits.shape)}, expected ({n}, classes){_advice(logits, n)}"
        )
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(
            f"model: returned logits of shape {tuple(logits.shape)}, expected at least 2 classes; if its only output z "
            "is the logit of class 1, return torch.cat([-z, z], 1)"
        )
    if highest_label >= classes:
        raise ValueError(f"{name}: got {highest_label}, expected class indices < {classes} (the logits per image)")
    return logits


def _advice(logits: Tensor, n: int) -> str:
    if logits.shape == (n,):
        return "; if they are the logits z of class 1, return torch.stack([-z, z], 1)"
    if logits.ndim > 2 and len(logits) == n:
        return "; a model with one answer per position needs pooling or flatten(1) first"
    return ""


def check_logits(logits: object, n: int, highest_label: int, *, first: int = 0) -> Tensor:
    """Return ``logits``; raise as `check_classes`, and ValueError if a logit is not finite.

    Args:
        logits: what the model returned.
        n: the number of images.
        highest_label: the largest label.
        first: the number of the first image, for the message.
    """
    checked = check_classes(logits, n, highest_label)
    if not checked.isfinite().all():
        bad = (~checked.isfinite()).any(dim=1).nonzero()[:, 0] + first
        raise ValueError(
            f"model: returned logits that are not finite for {image_numbers(bad, n)}, so no attack on it can be trusted"
        )
    return checked


def image_numbers(numbers: Tensor, n: int) -> str:
    """Return the first few image numbers and their count as text, e.g. ``images 3, 17 (2 of 128)``."""
    few = ", ".join(str(number) for number in numbers[:_NUMBERS_SHOWN].tolist())
    more = ", ..." if len(numbers) > _NUMBERS_SHOWN else ""
    return f"image{'s' if len(numbers) > 1 else ''} {few}{more} ({len(numbers)} of {n})"


def check_target(target: object, labels: Tensor) -> Tensor | None:
    """Return ``target``; raise as `check_labels`, and ValueError if the target of an image is its label."""
    if target is None:
        return None
    check_labels(target, len(labels), labels.device, name="target")
    assert isinstance(target, Tensor)
    same = int((target == labels).sum())
    if same:
        raise ValueError(f"target: got the label itself for {same} of {len(labels)} images, expected another class")
    return target


def check_generator(generator: object) -> torch.Generator:
    """Return ``generator``; raise TypeError if it is not a torch.Generator, ValueError if it is torch's global one."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {shown(generator)}, expected e.g. torch.Generator().manual_seed(0)")
    if any(generator is own for own in (torch.default_generator, *torch.cuda.default_generators)):
        raise ValueError(
            "generator: got torch's global one. Attacks restore its state, so every call would draw the same numbers; "
            "expected another, e.g. torch.Generator().manual_seed(torch.initial_seed())"
        )
    return generator
