"""Data as people have them (tensors, arrays, memory-mapped files, datasets, loaders), and models with other outputs."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from odeadv.attacks.checks import check_images, check_labels
from odeadv.attacks.objective import constant
from odeadv.data import ImageDataset, as_model_input
from odeadv.evaluation._attack import Batch
from odeadv.support.checks import shown
from odeadv.support.files import read_tensors

# Images that are read together from a dataset. Larger batches take more memory and no less time.
_READ = 256
_EXPECTED = "a pair (images, labels), a Dataset, a DataLoader or an ImageDataset"


@dataclass(frozen=True)
class Examples:
    """Images and labels, and the form in which the model takes them.

    Attributes:
        images: floating (n, ...) in [0, 1], or uint8 (n, h, w, channels).
        labels: (n,) int64.
        device: of the model.
        dtype: of the model.
        channels_last: lay 4-D images out channels-last in memory.
    """

    images: Tensor
    labels: Tensor
    device: torch.device
    dtype: torch.dtype
    channels_last: bool

    @property
    def highest_label(self) -> int:
        """The largest label."""
        return int(self.labels.max())

    def load(self, part: slice | Tensor) -> Batch:
        """Return images and labels as the model takes them."""
        places = torch.arange(*part.indices(len(self.images))) if isinstance(part, slice) else part.cpu()
        chosen = part if isinstance(part, slice) else part.to(self.images.device)
        x = as_model_input(
            constant(self.images[chosen]), device=self.device, dtype=self.dtype, channels_last=self.channels_last
        )
        label = part if isinstance(part, slice) else part.to(self.labels.device)
        return Batch(x, constant(self.labels[label]).to(self.device), places)


def read_data(data: object) -> tuple[Tensor, Tensor]:
    """Return images and labels.

    A memory-mapped array is not read into memory. A dataset or loader is read once, in its order, into a temporary
    file, so it may be larger than memory too.

    Args:
        data: a pair of tensors or NumPy arrays, an `ImageDataset` (its test images), a Dataset or a DataLoader.

    Raises:
        TypeError, ValueError: if it is anything else, or as `check_images` and `check_labels`.
    """
    if isinstance(data, ImageDataset):
        images, labels = data.test_images, data.test_labels
    elif isinstance(data, DataLoader):
        images, labels = _collected(data)
    elif isinstance(data, Dataset):
        images, labels = _collected(DataLoader(data, batch_size=_READ))
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        images, labels = _tensor(data[0]), _tensor(data[1])
        if labels is not data[1] and not labels.is_floating_point():
            labels = labels.long()  # NumPy's default integer depends on the platform
    else:
        raise TypeError(f"data: got {type(data).__name__}, expected {_EXPECTED}")
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        if images.ndim != 4 or images.shape[3] not in (1, 3) or images.numel() == 0:
            raise ValueError(
                f"images: got uint8 of shape {tuple(images.shape)}, expected (n, h, w, channels) with 1 or 3 channels"
            )
    else:
        check_images(images)
    check_labels(labels, len(images))
    return images, labels


def _tensor(value: object) -> Tensor:
    """Return a tensor that shares the memory of an array; return anything else as it is, for the checks to reject."""
    import numpy

    if not isinstance(value, numpy.ndarray):
        return value  # type: ignore[return-value]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(value)


def _collected(batches: Iterable[object]) -> tuple[Tensor, Tensor]:
    """Return the images of ``batches`` in a temporary file that is mapped into memory, and their labels."""
    import numpy

    labels: list[Tensor] = []
    first: Tensor | None = None
    with tempfile.TemporaryFile() as file:
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(p, Tensor) for p in batch):
                raise TypeError(f"data: got batches of {_kind(batch)}, expected pairs of tensors (images, labels)")
            images, label = batch
            first = images[:0] if first is None else first
            if images.shape[1:] != first.shape[1:] or images.dtype != first.dtype:
                raise ValueError(
                    f"data: got images of shape {tuple(images.shape[1:])} and dtype {images.dtype} after "
                    f"{tuple(first.shape[1:])} and {first.dtype}, expected equal ones"
                )
            file.write(images.detach().cpu().contiguous().numpy().tobytes())
            labels.append(label.detach().cpu())
        if first is None or not sum(len(label) for label in labels):
            raise ValueError("data: got no images, expected at least one")
        file.flush()
        together = torch.cat(labels)
        # The mapping stays valid after the file is closed: the system removes the file with its last user.
        array = numpy.memmap(file, first.cpu().numpy().dtype, "r", shape=(len(together), *first.shape[1:]))
    return _tensor(array), together


def _kind(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"{len(value)} items ({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


def saved_images(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the attacked images that `evaluate` saved: by name of the attack, (n, ...) in the order of the data.

    Raises:
        FileNotFoundError: if the folder does not contain such files.
        DamagedFileError: if a file is not whole or has been altered.
    """
    files = sorted(Path(folder).glob("batch-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"folder: {folder} lacks files batch-*.safetensors; give the save= of an evaluation")
    parts: dict[str, list[Tensor]] = {}
    for file in files:
        tensors, info = read_tensors(file)
        for place, name in enumerate(info["attacks"]):
            parts.setdefault(name, []).append(tensors[str(place)])
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


class Output(nn.Module):
    """A model whose logits are a part of its outputs (a tuple, a dict, an output of Hugging Face).

    Args:
        model: images to outputs.
        output: the key, attribute or index of the logits, or a function of the outputs.
    """

    def __init__(self, model: nn.Module, output: str | int | Callable[[Any], Tensor]) -> None:
        super().__init__()
        if isinstance(output, bool) or not (isinstance(output, str | int) or callable(output)):
            raise TypeError(f"output: got {shown(output)}, expected a key, an attribute, an index or a function")
        self.model, self.output = model, output

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of ``x``."""
        outputs, output = self.model(x), self.output
        if callable(output):
            return output(outputs)
        try:
            logits: Tensor = (
                getattr(outputs, output) if isinstance(output, str) and hasattr(outputs, output) else outputs[output]
            )
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"output: got {output!r}, but the model returned {type(outputs).__name__} without it"
            ) from None
        return logits
