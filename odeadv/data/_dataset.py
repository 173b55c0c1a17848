"""The in-memory data set that every reader returns."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from odeadv.data.checks import check_pixels, check_range
from odeadv.support.checks import class_indices, integer

Channels = tuple[float, float, float]

# Means and standard deviations of the official training sets, per channel and in [0, 1]. (Other projects use 0.2023,
# 0.1994, 0.2010 for CIFAR-10; these are means of the deviations of single images.)
_PUBLISHED: dict[str, tuple[Channels, Channels]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Labelled images of one size, split into a training set and a test set.

    Attributes:
        name: name of the data set, e.g. ``"cifar10"``.
        source: kind of source: ``"npz archive"``, ``"torchvision"``, ``"image folder"`` or ``"scikit-learn digits"``.
        train_images: ``uint8`` pixels, contiguous (n, height, width, 3).
        train_labels: ``int64`` class indices, (n,).
        test_images: as ``train_images``, with the same height and width.
        test_labels: as ``train_labels``.
        num_classes: number of classes; labels run from 0 to ``num_classes - 1``.
        flip: True if the mirror image of a sample has the same label (False for digits).

    Raises:
        TypeError, ValueError: if a field has the wrong dtype, shape or label range.
    """

    name: str
    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    flip: bool

    def __post_init__(self) -> None:
        """Validate every field."""
        integer("num_classes", self.num_classes, least=2)
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            check_pixels(f"{split}_images", images)
            if not images.is_contiguous():
                raise ValueError(f"{split}_images: got a non-contiguous tensor, expected images.contiguous()")
            class_indices(f"{split}_labels", labels, len(images))
            check_range(f"{split}_labels", labels, self.num_classes)
        if self.test_images.shape[1:] != self.train_images.shape[1:]:
            raise ValueError(
                f"test_images: got height, width, channels {tuple(self.test_images.shape[1:])}, expected those of "
                f"train_images, {tuple(self.train_images.shape[1:])}"
            )

    def __repr__(self) -> str:
        """Return sizes and source as text, without pixels."""
        height, width = self.train_images.shape[1:3]
        return (
            f"ImageDataset({self.name!r} from {self.source}: {len(self.train_labels)} train, {len(self.test_labels)} "
            f"test, {height}x{width}, {self.num_classes} classes)"
        )

    @property
    def mean(self) -> Channels:
        """The mean of each channel, for pixels in [0, 1].

        It is the published mean for CIFAR of any image size, and the mean of ``train_images`` for other data.
        """
        return self._moments[0]

    @property
    def std(self) -> Channels:
        """The standard deviation of each channel, as `mean`; 1 for a constant channel, so that division is safe."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[Channels, Channels]:
        if self.name in _PUBLISHED:
            return _PUBLISHED[self.name]
        (red, red_std), (green, green_std), (blue, blue_std) = (
            _channel_moments(self.train_images[..., channel]) for channel in range(3)
        )
        return (red, green, blue), (red_std, green_std, blue_std)

    def subset(self, train: int | None = None, test: int | None = None) -> ImageDataset:
        """Return a smaller data set whose classes have sizes as equal as possible.

        The first samples of every class are kept, in their present order. If the number is not a multiple of the number
        of classes, the lowest classes keep one more sample each. If a class has too few samples, the other classes keep
        more. The choice is not random.

        Args:
            train: number of training samples to keep; ``None`` keeps all.
            test: number of test samples to keep; ``None`` keeps all.

        Raises:
            TypeError, ValueError: if a number is not an int from 1 to the number of samples.
        """
        for argument, count, labels in (("train", train, self.train_labels), ("test", test, self.test_labels)):
            if count is not None:
                integer(argument, count, least=1)
                if count > len(labels):
                    raise ValueError(f"{argument}: got {count}, expected at most the {len(labels)} samples there are")
        kept_train = _balanced(self.train_labels, train, self.num_classes)
        kept_test = _balanced(self.test_labels, test, self.num_classes)
        return replace(
            self,
            train_images=self.train_images[kept_train],
            train_labels=self.train_labels[kept_train],
            test_images=self.test_images[kept_test],
            test_labels=self.test_labels[kept_test],
        )

    def resized(self, size: int) -> ImageDataset:
        """Return the same samples at ``size`` x ``size`` pixels; each pixel is the mean of an area, rounded to nearest.

        Args:
            size: the new height and width; it must divide the old height and width.

        Raises:
            TypeError, ValueError: if ``size`` is not an int that divides height and width.
        """
        size = integer("size", size)
        height, width = self.train_images.shape[1:3]
        if height % size or width % size:
            raise ValueError(f"size: got {size}, expected a divisor of height and width, {height} and {width}")
        rows, columns = height // size, width // size
        return replace(
            self,
            train_images=_shrunk(self.train_images, rows, columns),
            test_images=_shrunk(self.test_images, rows, columns),
        )

    def without_validation(self, count: int) -> tuple[ImageDataset, tuple[Tensor, Tensor]]:
        """Set ``count`` training samples aside; return the data set without them, and their images and labels.

        The last samples of every class are set aside, the same number per class as far as possible. The choice is not
        random.

        Raises:
            TypeError, ValueError: if ``count`` is not an int from 1 to the number of training samples minus 1.
        """
        integer("count", count, least=1)
        if count >= len(self.train_labels):
            raise ValueError(f"count: got {count}, expected fewer than the {len(self.train_labels)} training samples")
        last = len(self.train_labels) - 1
        aside = (last - torch.as_tensor(_chosen(self.train_labels.flip(0), count, self.num_classes))).sort().values
        kept = torch.ones(len(self.train_labels), dtype=torch.bool)
        kept[aside] = False
        rest = replace(self, train_images=self.train_images[kept], train_labels=self.train_labels[kept])
        return rest, (self.train_images[aside], self.train_labels[aside])

    def fold(self, number: int, count: int) -> ImageDataset:
        """Return a fold for cross-validation: part ``number`` of ``count`` training parts becomes the test set.

        The part has the samples number, number + count, ... of every class; the other training samples are the new
        training set. The division is not random. The present test images are not used.

        Raises:
            TypeError, ValueError: if ``count`` is below 2 or above the number of training samples, or ``number`` is not
                between 0 and ``count - 1``.
        """
        integer("count", count, least=2)
        integer("number", number, least=0)
        if number >= count or count > len(self.train_labels):
            raise ValueError(f"number, count: got {number} and {count}, expected number < count <= training samples")
        held = _rank(self.train_labels, self.num_classes) % count == number
        return replace(
            self,
            train_images=self.train_images[~held],
            train_labels=self.train_labels[~held],
            test_images=self.train_images[held],
            test_labels=self.train_labels[held],
        )

    def fingerprint(self) -> str:
        """Return 16 hex digits of a SHA-256 over images, labels and ``num_classes``; equal data have equal digits."""
        digest = hashlib.sha256(str(self.num_classes).encode())
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]


def _shrunk(images: Tensor, rows: int, columns: int) -> Tensor:
    """Return the means over blocks of ``rows`` x ``columns`` pixels, with integers only, to avoid a float copy."""
    n, height, width, channels = images.shape
    blocks = images.view(n, height // rows, rows, width // columns, columns, channels)
    area = rows * columns
    sums = blocks.sum((2, 4), dtype=torch.int32)
    return ((2 * sums + area) // (2 * area)).to(torch.uint8).contiguous()


def _channel_moments(pixels: Tensor) -> tuple[float, float]:
    # Sum integers over the histogram: this is exact and avoids a float copy of the training set.
    counts = torch.bincount(pixels.flatten(), minlength=256).cpu()
    values = torch.arange(256)
    n, total, squares = pixels.numel(), int((counts * values).sum()), int((counts * values**2).sum())
    deviation = math.sqrt(n * squares - total**2) / (n * 255)
    return total / (n * 255), deviation or 1.0


def _balanced(labels: Tensor, count: int | None, num_classes: int) -> Tensor | slice:
    return slice(None) if count is None else _chosen(labels, count, num_classes)


def _chosen(labels: Tensor, count: int, num_classes: int) -> Tensor:
    # Choosing the lowest (rank, label) pairs takes the same number from every class.
    return (_rank(labels, num_classes) * num_classes + labels).argsort()[:count].sort().values


def _rank(labels: Tensor, num_classes: int) -> Tensor:
    """Return the number of each sample within its class, counted from 0."""
    by_class = labels.argsort(stable=True)
    sizes = torch.bincount(labels, minlength=num_classes)
    first = (sizes.cumsum(0) - sizes)[labels[by_class]]
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels), device=labels.device) - first
    return rank


class Splits(NamedTuple):
    """Images ``uint8`` (n, height, width, 3) and labels ``int64`` (n,) of both sets, and the number of classes."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
