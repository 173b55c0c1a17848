"""Augmentation with torchvision's transforms: make them from plain data, and apply them to a batch with a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from odeadv.support.checks import did_you_mean, shown
from odeadv.support.extras import extra

#: A transform of one image, (channels, height, width).
Transform = Callable[[Tensor], Tensor]


def make_transform(specs: Sequence[Mapping[str, Any]]) -> Transform:
    """Return a function of one image that applies transforms of torchvision.transforms.v2 in order.

    Args:
        specs: one mapping per transform, with its class under ``name`` and its arguments. An argument may be such a
            mapping, or a list of such mappings (``RandomApply``, ``RandomChoice``).

    Raises:
        TypeError, ValueError: if a class is unknown or does not take the arguments; the message names ``augment``.
        ImportError: if torchvision is missing.
    """
    with extra("train"):
        from torchvision.transforms import v2
    made = [_make(v2, spec) for spec in specs]
    return made[0] if len(made) == 1 else v2.Compose(made)  # type: ignore[no-any-return]


def _make(v2: Any, spec: Any) -> Any:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise TypeError(f"augment: got {shown(spec)}, expected a mapping with a name and its arguments")
    name = spec["name"]
    known = [key for key, value in vars(v2).items() if isinstance(value, type) and issubclass(value, v2.Transform)]
    if name not in known:
        raise ValueError(
            f"augment: got {name!r}, expected a class of torchvision.transforms.v2{did_you_mean(name, known)}"
        )
    arguments = {key: _value(v2, value) for key, value in spec.items() if key != "name"}
    try:
        return getattr(v2, name)(**arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"augment: {name}: {error}") from None


def _value(v2: Any, value: Any) -> Any:
    if isinstance(value, Mapping) and "name" in value:
        return _make(v2, value)
    if isinstance(value, list | tuple):
        return [_value(v2, item) for item in value]
    return value


def transformed(images: Tensor, transform: Transform, seed: int) -> Tensor:
    """Apply ``transform`` to each of ``images``, (n, channels, height, width), with separate random numbers.

    The transforms draw from torch's global random state. It is seeded inside and restored afterwards.

    Raises:
        TypeError, ValueError: if the results are not tensors of one shape; the message names ``augment``.
    """
    if images.ndim != 4:
        raise ValueError(f"augment: got inputs of shape {tuple(images.shape)}, expected images (n, c, h, w)")
    cuda = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        found = [transform(image) for image in images]
    for image in found:
        if not isinstance(image, Tensor):
            raise TypeError(f"augment: returned {type(image).__name__}, expected a tensor (channels, height, width)")
    shapes = {tuple(image.shape) for image in found}
    if len(shapes) > 1:
        raise ValueError(f"augment: returned images of shapes {sorted(shapes)[:3]}, expected one shape")
    return torch.stack(found)


def draw_seed(generator: torch.Generator) -> int:
    """Draw the seed for the transforms of a batch."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
