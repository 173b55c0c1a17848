"""Data of every usual kind (tensors, arrays, memory-mapped files, datasets, loaders), and models with other outputs."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from odeadv.attacks.checks import check_images, check_labels
from odeadv.attacks.objective import constant
from odeadv.data import ImageDataset, as_model_input
from odeadv.evaluation._attack import Batch
from odeadv.support.checks import shown
from odeadv.support.digests import chunks
from odeadv.support.extras import extra
from odeadv.support.files import read_tensors, write_tensors

# So many images are read together from a dataset. Larger batches take more memory and save no time.
_READ = 256
_FILES = "batch-*.safetensors"
_EXPECTED = "a pair (images, labels), a Dataset, a DataLoader or an ImageDataset"


def nothing() -> None:
    """Do nothing, because these images hold no mapped memory."""


@dataclass(frozen=True)
class Examples:
    """Images and labels, and the form in which the model takes them.

    Attributes:
        images: floating (n, ...) in [0, 1], or uint8 (n, h, w, channels).
        labels: (n,) int64.
        device: device of the model.
        dtype: dtype of the model.
        channels_last: True to lay 4-D images out channels-last in memory.
        release: as for `CheckedData`.
    """

    images: Tensor
    labels: Tensor
    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    release: Callable[[], object] = nothing

    @property
    def highest_label(self) -> int:
        """The largest label."""
        return int(self.labels.max())

    def load(self, part: slice | Tensor) -> Batch:
        """Return images and labels in the form that the model takes."""
        self.release()  # free the images of the last batch
        places = torch.arange(*part.indices(len(self.images))) if isinstance(part, slice) else part.cpu()
        chosen = part if isinstance(part, slice) else part.to(self.images.device)
        x = as_model_input(
            constant(self.images[chosen]), device=self.device, dtype=self.dtype, channels_last=self.channels_last
        )
        label = part if isinstance(part, slice) else part.to(self.labels.device)
        return Batch(x, constant(self.labels[label]).to(self.device), places)


class CheckedData(NamedTuple):
    """Data that have been checked.

    Attributes:
        images: floating (n, ...) in [0, 1], or uint8 (n, h, w, channels).
        labels: (n,) int64.
        release: frees the memory of images that were read from a mapped file; does nothing for other images.
    """

    images: Tensor
    labels: Tensor
    release: Callable[[], object]


def read_data(data: object) -> CheckedData:
    """Return images and labels after checking them.

    A memory-mapped array is not read into memory. A dataset or loader is read once, in its order, into a temporary
    file, so it may also be larger than memory.

    Args:
        data: a pair of tensors or NumPy arrays, an `ImageDataset` (its test images), a Dataset or a DataLoader.

    Raises:
        TypeError, ValueError: if ``data`` is of another kind, or as `check_images` and `check_labels`.
    """
    release: Callable[[], object] = nothing
    if isinstance(data, ImageDataset):
        images, labels = data.test_images, data.test_labels
    elif isinstance(data, DataLoader):
        images, labels, release = _collected(data)
    elif isinstance(data, Dataset):
        images, labels, release = _collected(DataLoader(data, batch_size=_READ))
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        images, labels = _tensor(data[0]), _tensor(data[1])
        release = _release_of(data[0])
        if labels is not data[1] and not labels.is_floating_point():
            labels = labels.long()  # NumPy's default integer depends on the platform
    else:
        raise TypeError(f"data: got {type(data).__name__}, expected {_EXPECTED}")
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        if images.ndim != 4 or images.shape[3] not in (1, 3) or images.numel() == 0:
            raise ValueError(
                f"images: got uint8 of shape {tuple(images.shape)}, expected (n, h, w, channels) with 1 or 3 channels"
            )
    elif not isinstance(images, Tensor) or not images.numel():
        check_images(images)  # raises an error for such images
    else:
        for part in chunks(images, release):
            check_images(part)
    check_labels(labels, len(images))
    return CheckedData(images, labels, release)


def _release_of(array: object) -> Callable[[], object]:
    """Return a function that frees the memory of a file that is mapped for reading."""
    import mmap

    with extra("evaluate"):
        import numpy

    # Require mode "r": changes that were written to a mapping in another mode could be lost.
    if isinstance(array, numpy.memmap) and array.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
        mapped = array._mmap  # type: ignore[attr-defined]
        return lambda: mapped.madvise(mmap.MADV_DONTNEED)
    return nothing


def _tensor(value: object) -> Tensor:
    """Return a tensor that shares the memory of an array; return other values unchanged for the checks to reject."""
    with extra("evaluate"):
        import numpy

    if not isinstance(value, numpy.ndarray):
        return value  # type: ignore[return-value]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(value)


def _collected(batches: Iterable[object]) -> CheckedData:
    """Return the images of ``batches`` in a temporary file that is mapped into memory, and their labels."""
    with extra("evaluate"):
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
            # Write bytes, because NumPy lacks bfloat16.
            file.write(images.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            labels.append(label.detach().cpu())
        if first is None or not sum(len(label) for label in labels):
            raise ValueError("data: got no images, expected at least one")
        file.flush()
        together = torch.cat(labels)
        # The mapping stays valid after the file is closed: the system removes the file when nothing uses it any more.
        array = numpy.memmap(file, numpy.uint8, "r")
    pixels = _tensor(array).view(first.dtype).view(len(together), *first.shape[1:])
    return CheckedData(pixels, together, _release_of(array))


def _kind(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"{len(value)} items ({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


class ImageFolder:
    """The folder in which an evaluation saves its attacked images, one .safetensors file per batch.

    Args:
        path: the folder.
        about: data that identify the evaluation; they are stored in every file.
        resumed: True if the folder may hold finished batches of this evaluation.

    Raises:
        ValueError: if the folder holds images and the evaluation does not resume.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, resumed: bool) -> None:
        self._path, self._about = path, about
        if not resumed and any(path.glob(_FILES)):
            raise ValueError(f"save: {path} holds images of another evaluation; give another folder or remove them")

    def file(self, number: int) -> Path:
        """Return the file of a batch."""
        return self._path / f"batch-{number:05}.safetensors"

    def write(self, number: int, first: int, images: Mapping[str, Tensor]) -> None:
        """Save the attacked images of a batch, by the name of the attack; its first image is number ``first``."""
        # Names of tensors in a file may not repeat and need not be readable: the attacks' names are in the header.
        tensors = {str(place): attacked for place, attacked in enumerate(images.values())}
        write_tensors(self.file(number), tensors, {"attacks": list(images), "first": first, **self._about})


def saved_images(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the attacked images that `evaluate` saved, by the name of the attack; (n, ...) in the order of the data.

    Args:
        folder: the folder that `evaluate` got as ``save``.

    Raises:
        FileNotFoundError: if the folder does not contain such files.
        ValueError: if images are missing, or images of several evaluations are mixed.
        DamagedFileError: if a file is incomplete or has been altered.
    """
    files = sorted(Path(folder).glob(_FILES))
    if not files:
        raise FileNotFoundError(f"folder: {folder} lacks files {_FILES}; give the save= of an evaluation")
    parts: dict[str, list[Tensor]] = {}
    about: dict[str, Any] = {}
    found = 0
    for file in files:
        tensors, info = read_tensors(file)
        first, own = info.pop("first"), info
        about = about or own
        if own != about:
            raise ValueError(f"folder: {file} belongs to another evaluation than {files[0]}; remove those of one")
        if first != found:
            raise ValueError(
                f"folder: {folder} lacks images {found} to {first - 1}; resume the evaluation with this save="
            )
        for place, name in enumerate(info["attacks"]):
            parts.setdefault(name, []).append(tensors[str(place)])
        found += len(tensors["0"])
    if found != about["n"]:
        raise ValueError(f"folder: {folder} has {found} of {about['n']} images; resume the evaluation with this save=")
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


class Output(nn.Module):
    """A wrapper for a model whose logits are a part of its outputs (a tuple, a dict, an output of Hugging Face).

    Args:
        model: maps images to outputs.
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
