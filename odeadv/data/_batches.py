"""Batches of float images from a ``uint8`` array, with the standard CIFAR augmentation (zero padding, crop, flip)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from odeadv.data._transforms import Transform, draw_seed, transformed
from odeadv.data.checks import check_pixels
from odeadv.support.checks import class_indices, integer


def to_float(images: Tensor) -> Tensor:
    """Convert pixels to the form that models take.

    Args:
        images: ``uint8``, (n, height, width, 3).

    Returns:
        ``float32``, (n, 3, height, width) in ``channels_last`` memory format. Every value is ``pixel / 255``, correctly
        rounded.

    Raises:
        TypeError, ValueError: if ``images`` has another dtype or shape.
    """
    check_pixels("images", images)
    # Divide by 255: multiplying by 1/255 would give a wrong last bit for some pixels.
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last).div_(255)


def as_floats(images: Tensor) -> Tensor:
    """Return images (n, channels, height, width) as floats in ``channels_last``; uint8 pixels are divided by 255."""
    if images.dtype != torch.uint8:
        return images.contiguous(memory_format=torch.channels_last)
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def random_crop_flip(
    images: Tensor, *, pad: int = 4, flip: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Pad with zeros, crop to the old size at a random place, and mirror left-right with probability 1/2.

    Every image has its own offsets. The draws from ``generator`` are, in this order: n row offsets and n column offsets
    in 0..2*pad; then n bits if ``flip``.

    Args:
        images: ``uint8``, (n, height, width, 3).
        pad: number of zeros added on each side.
        flip: True mirrors each image with probability 1/2.
        generator: the source of randomness. None raises an error, because the crops would not be reproducible.

    Returns:
        ``uint8``, (n, height, width, 3), contiguous.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or range, or ``generator`` is missing.
    """
    check_pixels("images", images)
    integer("pad", pad, least=0)
    source = _check_generator(generator, "random_crop_flip")
    window = Window(images.shape[1], images.shape[2], pad, flip)
    moves = draw_moves(len(images), window, source)
    return _augmented(_padded(images, pad), torch.arange(len(images), device=images.device), window, moves)


class Batches:
    """The batches of a data set in memory. Each iteration gives one epoch; ``len`` is the number of batches.

    It yields ``(images, labels)``. Images are ``float32`` (b, 3, height, width) in [0, 1], in ``channels_last`` format
    (see `to_float`); labels are ``int64`` (b,). With ``shuffle`` every epoch has its own order. Equal generator states
    give equal epochs. The global random state is neither used nor changed.

    Args:
        images: ``uint8``, (n, height, width, 3).
        labels: ``int64``, (n,).
        batch_size: number of samples in a batch; the last batch may have fewer.
        shuffle: True draws a new order for every epoch.
        augment: True applies `random_crop_flip`, with new draws for every batch. The array is padded once here,
            so this keeps a copy of 3 (height + 2 pad) (width + 2 pad) bytes per image.
        flip: True allows augmentation to mirror images; pass ``dataset.flip``.
        pad: number of zeros added on each side before cropping.
        transform: a function of one image, uint8 (3, height, width), instead of ``augment``; see `make_transform`.
        drop_last: True leaves out a last batch that is not full.
        generator: the source of randomness, needed for ``shuffle`` and ``augment``.
        device: the device of the arrays and the batches.
        draws: where the moves of an epoch are drawn. ``"cpu"`` gives the same numbers for every device. ``"device"``
            uses a generator on the device, seeded by one draw from ``generator``, and avoids copies to the device.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or range, a needed ``generator`` is
            missing, or an epoch would have zero batches.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        shuffle: bool = False,
        augment: bool = False,
        flip: bool = True,
        pad: int = 4,
        transform: Transform | None = None,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
        draws: Place = "cpu",
    ) -> None:
        """Validate the arguments, move the arrays to ``device`` and pad them if they are to be augmented."""
        check_pixels("images", images)
        class_indices("labels", labels, len(images))
        integer("batch_size", batch_size, least=1)
        integer("pad", pad, least=0)
        if len(labels) < (batch_size if drop_last else 1):
            raise ValueError(
                f"images: got {len(labels)} samples, which make no batch of batch_size={batch_size} with drop_last="
                f"{drop_last}; give more samples, a smaller batch_size or drop_last=False"
            )
        if augment and transform is not None:
            raise ValueError("transform: got one with augment=True, expected one of the two")
        if shuffle or augment or transform is not None:
            _check_generator(generator, f"shuffle={shuffle}, augment={augment}")
        self._window = Window(images.shape[1], images.shape[2], pad, flip) if augment else None
        self._images = _padded(images.to(device), pad) if augment else images.to(device).contiguous()
        self._labels = labels.to(device)
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._generator = generator
        self._passed_over = 0
        self._transform = transform
        self._draws: Place = draws

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        full, rest = divmod(len(self._labels), self._batch_size)
        return full + (rest > 0 and not self._drop_last)

    def pass_over(self, batches: int) -> None:
        """Skip ``batches`` batches in the next iteration, but make their random draws.

        If the generator has the state of the beginning of an epoch, the next iteration gives the rest of that epoch.

        Raises:
            ValueError: if ``batches`` is not between 0 and ``len``.
        """
        if not 0 <= batches <= len(self):
            raise ValueError(f"batches: got {batches}, expected 0 to {len(self)}, the number in an epoch")
        self._passed_over = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one epoch."""
        first, self._passed_over = self._passed_over, 0
        n, device = len(self._labels), self._labels.device
        if self._shuffle and self._generator is not None:
            order = torch.randperm(n, generator=self._generator, device=self._generator.device).to(device)
        else:
            order = torch.arange(n, device=device)
        parts = torch.split(order[: len(self) * self._batch_size], self._batch_size)
        moves: list[Moves] = []
        if self._window is not None and self._generator is not None:
            moves = draw_epoch([len(part) for part in parts], self._window, self._generator, device, self._draws)
        for batch, chosen in enumerate(parts):
            if self._window is not None:
                if batch < first:
                    continue
                images = _augmented(self._images, chosen, self._window, moves[batch])
            elif self._transform is not None and self._generator is not None:
                seed = draw_seed(self._generator)
                if batch < first:
                    continue
                pixels = self._images.index_select(0, chosen).permute(0, 3, 1, 2)
                yield as_floats(transformed(pixels, self._transform, seed)), self._labels.index_select(0, chosen)
                continue
            elif batch < first:
                continue
            else:
                images = self._images.index_select(0, chosen)
            yield to_float(images), self._labels.index_select(0, chosen)


#: The device on which random numbers are drawn: the CPU, or the device of the batches.
Place = Literal["cpu", "device"]


class Window(NamedTuple):
    """The size of the cut from a padded image, and the moves that are allowed."""

    height: int
    width: int
    pad: int
    flip: bool


def _check_generator(generator: torch.Generator | None, needed_by: str) -> torch.Generator:
    if generator is None:
        raise ValueError(
            f"generator: got None, expected a torch.Generator for {needed_by}; pass torch.Generator().manual_seed(seed)"
        )
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}, expected a torch.Generator")
    return generator


def _padded(images: Tensor, pad: int) -> Tensor:
    return functional.pad(images, (0, 0, pad, pad, pad, pad)).contiguous()


class Moves(NamedTuple):
    """The move of each image: first row and first column of the cut, and True if it is mirrored; (n, 1) each."""

    top: Tensor
    left: Tensor
    mirrored: Tensor | None


def draw_moves(n: int, window: Window, generator: torch.Generator) -> Moves:
    """Draw the shifts of ``n`` images, and the flips if ``window`` allows flips."""

    def drawn(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator, device=generator.device)

    return Moves(drawn(2 * window.pad + 1), drawn(2 * window.pad + 1), drawn(2) == 1 if window.flip else None)


def draw_epoch(
    sizes: Sequence[int], window: Window, generator: torch.Generator, device: torch.device, draws: Place
) -> list[Moves]:
    """Draw the moves of all batches of an epoch at once, so that batches need not wait for copies to the device.

    Args:
        sizes: number of images per batch; at least one batch.
        window: the size of the cut and the allowed moves.
        generator: the source of randomness. On the CPU the numbers are the same as from `draw_moves` for each batch.
        device: device of the moves.
        draws: ``"device"`` draws on ``device``, with a generator that is seeded by one draw from ``generator``.
    """
    if draws == "device":
        whole = draw_moves(sum(sizes), window, torch.Generator(device).manual_seed(draw_seed(generator)))
    else:
        top, left, mirrored = zip(*(draw_moves(n, window, generator) for n in sizes), strict=True)
        flips = torch.cat([part for part in mirrored if part is not None]).to(device) if window.flip else None
        whole = Moves(torch.cat(top).to(device), torch.cat(left).to(device), flips)
    parts = [[None] * len(sizes) if part is None else torch.split(part, list(sizes)) for part in whole]
    return [Moves(*move) for move in zip(*parts, strict=True)]


def _augmented(padded: Tensor, chosen: Tensor, window: Window, moves: Moves) -> Tensor:
    """Cut and mirror the ``chosen`` images in one gather of pixels, (b, height, width, 3)."""
    height, width = window.height, window.width
    n, device = len(chosen), padded.device
    rows = chosen[:, None] * padded.shape[1] + moves.top.to(device) + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    if moves.mirrored is not None:
        columns = torch.where(moves.mirrored.to(device), columns.flip(0), columns)
    columns = columns + moves.left.to(device)
    pixels = (rows * padded.shape[2])[:, :, None] + columns[:, None, :]
    return padded.view(-1, 3).index_select(0, pixels.view(-1)).view(n, height, width, 3)


def as_model_input(images: Tensor, *, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Return images in [0, 1] on ``device``: uint8 (n, h, w, channels) becomes ``dtype`` (n, channels, h, w) / 255.

    Floating images keep dtype and shape. With ``channels_last``, 4-D results are channels-last in memory. All other
    results are contiguous.

    Args:
        images: uint8 images (n, height, width, channels), or floating images or inputs of any shape.
        device: device of the result.
        dtype: floating dtype of the result for uint8 images.
        channels_last: True for channels-last memory, which convolutions on GPUs prefer.
    """
    images = images.to(device)
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2).to(dtype) / 255
    layout = torch.channels_last if channels_last and images.ndim == 4 else torch.contiguous_format
    return images.contiguous(memory_format=layout)
