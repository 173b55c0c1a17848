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


class Stream:
    """The batches of one epoch each time it is iterated over, read from a data set or loader as they are needed.

    It yields ``(inputs, labels)`` of full batches: images as floats (n, channels, height, width) in [0, 1], other
    inputs as the data set has them, and int64 labels. The order of a data set is drawn from ``generator``; a loader has
    its own. While samples are read, torch's global random state is one that follows from ``generator``, and it is put
    back afterwards, so random transforms that draw from torch repeat. Transforms that draw from `random` or NumPy in
    this process do not repeat.

    Args:
        source: of pairs (input, class number). Inputs are tensors, PIL images, or arrays.
        batch_size: samples per batch; a loader has this one.
        pad: zeros around an image before it is cropped to its size at a random place; 0 for none.
        flip: True mirrors half of the images.
        transform: of one image, (channels, height, width), uint8 or as the data set has it; see `make_transform`.
        generator: the source of randomness.
        device: of the batches.
        draws: where crops and mirrors are drawn; see `Batches`.

    Raises:
        TypeError, ValueError: naming ``data``, if it lacks a length, a full batch or another batch size.
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
        """Let the next iteration begin after ``batches`` batches. A loader reads them all the same."""
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
        """Return the batches of the data set in a random order; None for those that are passed over, unread."""
        source: Any = self._source
        # Drawn at once, not when the first batch is asked for: the moves of the images are drawn after it.
        order = torch.randperm(self._samples, generator=self._generator).tolist()

        def read(number: int) -> tuple[Any, Any] | None:
            if number < first:
                return None
            chosen = order[number * self._batch_size : (number + 1) * self._batch_size]
            with _Random(random.seed + number):
                return stacked([source[index] for index in chosen])

        return map(read, range(len(self)))

    def _loaded(self, random: _Random) -> Iterator[tuple[Any, Any]]:
        """Yield the batches of the loader, whose generator begins anew from the seed of the epoch."""
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
    """Return pairs (input, class number) as one batch.

    Raises:
        TypeError, ValueError: naming ``data``, if a sample is not a pair or the inputs differ in shape.
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
        except (TypeError, ValueError, RuntimeError):  # text, or tensors of several shapes
            raise TypeError(f"data: got targets such as {shown(labels[0])}, expected class numbers") from None
    return torch.stack(inputs), class_numbers(labels)


def class_numbers(labels: Any) -> Tensor:
    """Return labels, (n,) or (n, 1), as int64 class numbers (n,).

    Raises:
        TypeError: naming ``data``, if they are something else. A cast would make class 0 of a target such as 0.7.
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
    import numpy as np  # here, so that solving and attacks need torch alone

    return torch.as_tensor(np.array(value))  # a copy: the memory of a PIL image cannot be written


def as_inputs(inputs: Any) -> Tensor:
    """Return a batch as a network takes it: uint8 images as floats (n, channels, height, width) in [0, 1].

    Pixels with channels last are recognised by 1, 3 or 4 channels there and not after the first axis.
    """
    batch = channels_first(inputs)
    return batch.to(torch.float32) / 255 if batch.dtype == torch.uint8 else batch


def channels_first(inputs: Any) -> Tensor:
    """Return uint8 images as (n, channels, height, width), and other inputs as they are; see `as_inputs`."""
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
    """Torch's global random state, CPU only, for the reading of samples: it goes on from one use to the next."""

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
