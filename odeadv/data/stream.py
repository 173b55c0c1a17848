"""Batches of a `torch.utils.data.Dataset` or `DataLoader`, with an order and random numbers that a run can resume."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from odeadv.data._batches import Moves, Place, Window, draw_epoch
from odeadv.data._transforms import Transform, draw_seed, transformed
from odeadv.support.checks import integer, shown
from odeadv.support.extras import extra


class Stream:
    """The batches of a data set or loader, read when they are needed. Each iteration gives one epoch.

    It yields full batches ``(inputs, labels)``. Images are floats (n, channels, height, width) in [0, 1]; other inputs
    keep the form that the data set gives; labels are int64. The order of a data set is drawn from ``generator``; a
    loader has its own order. While samples are read, torch's global random state is seeded from ``generator``, and it
    is restored afterwards. So random transforms that draw from torch are repeatable. Transforms that draw from `random`
    or NumPy in this process are not repeatable.

    Args:
        source: a data set or loader of pairs (input, class number). Inputs are tensors, PIL images, or arrays.
        batch_size: number of samples per batch; a loader must have the same batch size.
        pad: number of zeros around an image before it is cropped to its size at a random place; 0 switches this off.
        flip: True mirrors each image with probability 1/2.
        transform: a function of one image (channels, height, width), uint8 or in the form that the data set gives; see
            `make_transform`.
        generator: the source of randomness.
        device: device of the batches.
        draws: where crops and mirrors are drawn; see `Batches`.

    Raises:
        TypeError, ValueError: if the source lacks a length or a full batch, or has another batch size; the message
            names ``data``.
    """

    def __init__(
        self,
        source: Dataset[Any] | DataLoader[Any],
        *,
        batch_size: int,
        pad: int = 0,
        flip: bool = False,
        transform: Transform | None = None,
        generator: torch.Generator,
        device: str | torch.device = "cpu",
        draws: Place = "cpu",
    ) -> None:
        self._source, self._batch_size, self._generator = source, integer("batch_size", batch_size), generator
        self._pad, self._flip, self._device = pad, flip, torch.device(device)
        self._samples = count_samples(source)
        if isinstance(source, DataLoader) and source.batch_size != batch_size:
            raise ValueError(
                f"data: got a DataLoader with batch_size={source.batch_size}, expected batch_size={batch_size} of the "
                "configuration; eta belongs to a batch size"
            )
        if self._samples < batch_size:
            raise ValueError(f"data: got {self._samples} samples, expected at least batch_size={batch_size}")
        self._passed_over = 0
        self._transform = transform
        self._draws: Place = draws

    def __len__(self) -> int:
        """Return the number of full batches in an epoch."""
        return self._samples // self._batch_size

    def pass_over(self, batches: int) -> None:
        """Skip ``batches`` batches in the next iteration; a loader still reads these batches."""
        self._passed_over = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one epoch."""
        first, self._passed_over = self._passed_over, 0
        random = _Random(int(torch.randint(2**62, (), generator=self._generator)))
        batches = self._loaded(random) if isinstance(self._source, DataLoader) else self._indexed(random, first)
        moves: list[Moves] = []
        if self._pad or self._flip:
            window, sizes = Window(0, 0, self._pad, self._flip), [self._batch_size] * len(self)
            moves = draw_epoch(sizes, window, self._generator, self._device, self._draws)
        for number, batch in enumerate(batches):
            if number == len(self):
                return
            seed = None if self._transform is None else draw_seed(self._generator)
            if number < first:
                continue
            assert batch is not None
            inputs = channels_first(batch[0]).to(self._device)
            if self._transform is not None and seed is not None:
                inputs = transformed(inputs, self._transform, seed)
            inputs = as_inputs(inputs)
            labels = class_numbers(batch[1]).to(self._device)
            yield moved(inputs, moves[number], self._pad) if moves else inputs, labels

    def _indexed(self, random: _Random, first: int) -> Iterator[tuple[Any, Any] | None]:
        """Return the batches of the data set in a random order; None for skipped batches, which are not read."""
        source: Any = self._source
        # Draw the order now, not with the first batch, because the moves of the images must be drawn after it.
        order = torch.randperm(self._samples, generator=self._generator).tolist()

        def read(number: int) -> tuple[Any, Any] | None:
            if number < first:
                return None
            chosen = order[number * self._batch_size : (number + 1) * self._batch_size]
            with _Random(random.seed + number):
                return stacked([source[index] for index in chosen])

        return map(read, range(len(self)))

    def _loaded(self, random: _Random) -> Iterator[tuple[Any, Any]]:
        """Yield the batches of the loader, after seeding its generators with the seed of the epoch."""
        assert isinstance(self._source, DataLoader)
        samplers = (self._source, self._source.sampler, self._source.batch_sampler)
        for generator in (getattr(sampler, "generator", None) for sampler in samplers):
            if isinstance(generator, torch.Generator):
                generator.manual_seed(random.seed)
        with random:
            batches = iter(self._source)
        while True:
            with random:
                batch = next(batches, None)
            if batch is None:
                return
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"data: the loader returned {type(batch).__name__}, expected a pair (inputs, labels)")
            if len(batch[1]) == self._batch_size:
                yield batch[0], batch[1]


def count_samples(source: Any) -> int:
    """Return the number of samples.

    Raises:
        TypeError: if the source lacks a length, or is an `IterableDataset` without a loader.
    """
    data = source.dataset if isinstance(source, DataLoader) else source
    if not isinstance(data, Sized):
        raise TypeError(
            f"data: got {type(data).__name__} without a length, expected a data set with __len__: an epoch, and a run "
            "that goes on, need the number of samples; add __len__, or write a loop with odeadv.training.Layerwise"
        )
    if isinstance(source, IterableDataset):
        raise TypeError(
            f"data: got {type(data).__name__}, an IterableDataset, expected one in a DataLoader, which makes batches"
        )
    if isinstance(source, DataLoader) and isinstance(source.sampler, Sized):
        return len(source.sampler)
    return len(data)


def stacked(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """Stack pairs (input, class number) into one batch.

    Raises:
        TypeError, ValueError: if a sample is not a pair or the inputs differ in shape; the message names ``data``.
    """
    for sample in samples:
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise TypeError(f"data: a sample is {shown(sample)}, expected a pair (input, class number)")
    inputs = [x if isinstance(x, Tensor) else _as_tensor(x) for x, _ in samples]
    shapes = {tuple(x.shape) for x in inputs}
    if len(shapes) > 1:
        raise ValueError(f"data: got inputs of shapes {sorted(shapes)[:3]}, expected one; resize or crop them")
    labels: Any = [label for _, label in samples]
    if not all(isinstance(label, int) for label in labels):
        try:
            labels = torch.stack([torch.as_tensor(label) for label in labels])
        except (TypeError, ValueError, RuntimeError):  # the targets are text, or tensors of several shapes
            raise TypeError(f"data: got targets such as {shown(labels[0])}, expected class numbers") from None
    return torch.stack(inputs), class_numbers(labels)


def class_numbers(labels: Any) -> Tensor:
    """Return labels, (n,) or (n, 1), as int64 class numbers (n,).

    Raises:
        TypeError: if they are not class numbers; the message names ``data``. (A cast would turn 0.7 into class 0.)
    """
    numbers = torch.as_tensor(labels)
    if numbers.shape[1:] == (1,):
        numbers = numbers[:, 0]
    if numbers.ndim != 1 or numbers.is_floating_point() or numbers.is_complex():
        raise TypeError(
            f"data: got targets of {numbers.dtype} and shape {tuple(numbers.shape[1:])}, expected class numbers; for "
            "soft labels, regression and sequences write a loop with odeadv.training.Layerwise"
        )
    return numbers.to(torch.int64)


def _as_tensor(value: Any) -> Tensor:
    with extra("train"):
        import numpy as np

    return torch.as_tensor(np.array(value))  # copy, because the memory of a PIL image is read-only


def as_inputs(inputs: Any) -> Tensor:
    """Return a batch for a network; uint8 images become floats (n, channels, height, width) in [0, 1].

    Images are taken as channels-last if the last axis has 1, 3 or 4 entries, and the second axis has another number.
    """
    batch = channels_first(inputs)
    return batch.to(torch.float32) / 255 if batch.dtype == torch.uint8 else batch


def channels_first(inputs: Any) -> Tensor:
    """Return uint8 images as (n, channels, height, width), and other inputs unchanged; see `as_inputs`."""
    batch = torch.as_tensor(inputs)
    if batch.dtype != torch.uint8:
        return batch
    if batch.ndim == 3:
        batch = batch[:, None]
    if batch.ndim == 4 and batch.shape[3] in (1, 3, 4) and batch.shape[1] not in (1, 3, 4):
        batch = batch.permute(0, 3, 1, 2)
    return batch


def moved(images: Tensor, moves: Moves, pad: int) -> Tensor:
    """Return images, (n, channels, height, width), after random crops and mirrors.

    Raises:
        ValueError: if the inputs are not images.
    """
    if images.ndim != 4:
        raise ValueError(
            f'augment: got inputs of shape {tuple(images.shape)}, expected images (n, c, h, w); set augment="none"'
        )
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    rows = moves.top.to(images.device) + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(n, -1)
    if moves.mirrored is not None:
        columns = torch.where(moves.mirrored.to(images.device), columns.flip(1), columns)
    columns = columns + moves.left.to(images.device)
    numbers = torch.arange(n, device=images.device)[:, None, None]
    return padded[numbers, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class _Random:
    """Torch's global random state on the CPU while samples are read; each use continues after the previous one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._own = torch.Generator().manual_seed(seed).get_state()
        self._callers: Tensor | None = None

    def __enter__(self) -> None:
        self._callers = torch.get_rng_state()
        torch.set_rng_state(self._own)

    def __exit__(self, *_: object) -> None:
        assert self._callers is not None
        self._own = torch.get_rng_state()
        torch.set_rng_state(self._callers)
