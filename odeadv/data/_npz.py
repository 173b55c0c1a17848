"""Reading one ``.npz`` archive of images and labels."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from odeadv.data._splits import Splits
from odeadv.data.checks import check_labels, check_range

KEYS = ("train_x", "train_y", "test_x", "test_y")


def read_npz(path: Path, num_classes: int | None) -> Splits:
    """Read ``train_x``, ``train_y``, ``test_x``, ``test_y``; images NHWC or NCHW, labels of any integer type.

    Args:
        path: the archive. Pickled objects in it are refused.
        num_classes: what the labels must stay below; ``None`` counts the training labels, which must then be 0 to
            K-1 with none left out.

    Raises:
        ValueError: the file cannot be read, lacks a key, or an array has the wrong dtype, shape or labels. The
            message names the file and the key.
    """
    arrays = _arrays(path)
    train_images, test_images = (_images(arrays[key], f"{path}: {key}") for key in ("train_x", "test_x"))
    train_labels, test_labels = (_labels(arrays[key], f"{path}: {key}") for key in ("train_y", "test_y"))
    check_labels(f"{path}: train_y", train_labels, train_images)
    check_labels(f"{path}: test_y", test_labels, test_images)
    if test_images.shape[1:] != train_images.shape[1:]:
        raise ValueError(
            f"{path}: test_x: got images of height, width, channels {tuple(test_images.shape[1:])}, expected those of "
            f"train_x, {tuple(train_images.shape[1:])}"
        )
    if num_classes is None:
        present = np.unique(arrays["train_y"]).tolist()
        num_classes = len(present)
        if num_classes < 2 or present != list(range(num_classes)):
            raise ValueError(
                f"{path}: train_y: got the {num_classes} distinct labels {_abridged(present)}, expected 0 to "
                "K-1 with every class present and K at least 2; renumber the labels"
            )
    check_range(f"{path}: train_y", train_labels, num_classes)
    check_range(f"{path}: test_y", test_labels, num_classes)
    return Splits(train_images, train_labels, test_images, test_labels, num_classes)


def _arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in KEYS if key not in archive.files]
            if not missing:
                return {key: archive[key] for key in KEYS}
            found = archive.files
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: cannot be read as an .npz archive of plain arrays ({type(error).__name__}: {error}); write it "
            f"again with numpy.savez and the keys {', '.join(KEYS)}"
        ) from error
    raise ValueError(f"{path}: lacks {', '.join(missing)}; got the keys {_abridged(found)}, expected {', '.join(KEYS)}")


def _images(array: NDArray[np.generic], where: str) -> Tensor:
    if array.dtype != np.uint8:
        raise ValueError(f"{where}: got dtype {array.dtype}, expected uint8 pixels from 0 to 255; convert them first")
    if array.ndim == 4 and array.shape[3] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] != 3 or array.shape[1] == 0 or array.shape[2] == 0:
        raise ValueError(f"{where}: got shape {array.shape}, expected (n, height, width, 3) or (n, 3, height, width)")
    return torch.from_numpy(np.ascontiguousarray(array))


def _labels(array: NDArray[np.generic], where: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{where}: got dtype {array.dtype} and shape {array.shape}, expected integers of shape (n,)")
    return torch.from_numpy(array.astype(np.int64))


def _abridged(values: Sequence[object]) -> str:
    shown = ", ".join(map(str, values[:10]))
    return f"[{shown}{', ...' if len(values) > 10 else ''}]"
