"""Readers of data sets: a folder of images, an .npz archive, scikit-learn's digits, and torchvision's CIFAR."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from odeadv.data._dataset import Splits
from odeadv.data.checks import check_range
from odeadv.support.checks import class_indices
from odeadv.support.extras import extra

if TYPE_CHECKING:
    from numpy.typing import NDArray
with contextlib.suppress(ModuleNotFoundError):  # `load` reports missing packages
    import numpy as np

#: The suffixes that torchvision's ImageFolder reads.
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def read_folder(root: Path) -> Splits:
    """Read ``root/train`` and ``root/test``, whose subfolders are classes, numbered by their names in ``train``.

    Images may be in subfolders of a class. Greyscale, palette and transparent images are converted to RGB. Files and
    folders whose names start with a dot are skipped.

    Warns:
        UserWarning: if files are skipped because of their suffix (with counts and suffixes), or if a class of ``train``
            lacks images in ``test``.

    Raises:
        ImportError: if Pillow is missing.
        ValueError: if there are fewer than two classes, a class lacks images, or ``train`` lacks a test class. Also if
            a file is not an 8-bit image, or has another size than the first image. The message names the file.
    """
    classes = _classes(root / "train")
    if len(classes) < 2:
        raise ValueError(f"{root / 'train'}: got the class folders {classes}, expected at least two")
    unknown = sorted(set(_classes(root / "test")) - set(classes))
    if unknown:
        raise ValueError(
            f"{root / 'test'}: got the class folders {unknown}, which {root / 'train'} does not have; expected a "
            f"subset of its {len(classes)} classes"
        )
    train_files = [_files(root / "train" / name) for name in classes]
    for name, files in zip(classes, train_files, strict=True):
        if not files:
            raise ValueError(
                f"{root / 'train' / name}: got no images, expected files ending in {', '.join(EXTENSIONS)}"
            )
    test_files = [_files(root / "test" / name) for name in classes]
    if not any(test_files):
        raise ValueError(
            f"{root / 'test'}: got no images, expected <class>/<image> with files ending in {', '.join(EXTENSIONS)}"
        )
    _warn_of_skipped(root)
    absent = [name for name, files in zip(classes, test_files, strict=True) if not files]
    if absent:
        warnings.warn(
            f"{root / 'test'}: lacks images of {len(absent)} of {len(classes)} classes: {_abridged(absent)}",
            stacklevel=2,
        )
    first = train_files[0][0]
    shape = _pixels(first).shape
    train_images, train_labels = _read_images(train_files, first, shape)
    test_images, test_labels = _read_images(test_files, first, shape)
    return Splits(train_images, train_labels, test_images, test_labels, len(classes))


def _warn_of_skipped(root: Path) -> None:
    """Warn about files in ``train`` and ``test`` that are not read, with their number per suffix."""
    skipped: Counter[str] = Counter()
    for split in ("train", "test"):
        inside = {path for name in _classes(root / split) for path in _files(root / split / name)}
        there = {path for path in (root / split).rglob("*") if path.is_file() and not _is_hidden(path, root)}
        skipped.update(path.suffix.lower() or "no suffix" for path in there - inside)
    if skipped:
        counts = ", ".join(f"{count} with {suffix}" for suffix, count in skipped.most_common())
        warnings.warn(
            f"{root}: {sum(skipped.values())} files are skipped ({counts}), expected {', '.join(EXTENSIONS)} in "
            "<split>/<class>",
            stacklevel=3,
        )


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and not _is_hidden(p, folder))


def _read_images(files: list[list[Path]], first: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    labels = [label for label, paths in enumerate(files) for _ in paths]
    images = np.empty((len(labels), *shape), dtype=np.uint8)
    for index, path in enumerate(path for paths in files for path in paths):
        pixels = _pixels(path)
        if pixels.shape != shape:
            raise ValueError(
                f"{path}: got {pixels.shape[0]}x{pixels.shape[1]} pixels (height x width), expected {shape[0]}x"
                f"{shape[1]} as in {first}; all images must have one size"
            )
        images[index] = pixels
    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)


def _pixels(path: Path) -> NDArray[np.uint8]:
    with extra("train"):
        from PIL import Image
    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error
    # Pillow would clip images of these modes to 255 instead of scaling them.
    if mode.startswith(("I", "F")):
        raise ValueError(f"{path}: got an image of mode {mode!r}, expected 8 bits per channel; convert it first")
    return pixels


KEYS = ("train_x", "train_y", "test_x", "test_y")


def read_npz(path: Path, num_classes: int | None) -> Splits:
    """Read ``train_x``, ``train_y``, ``test_x``, ``test_y``; images NHWC or NCHW, labels of any integer type.

    Args:
        path: the archive. Pickled objects in it are rejected.
        num_classes: number of classes; labels must be below it. ``None`` counts the training labels, which must then be
            all of 0, ..., K-1.

    Raises:
        ValueError: if the file cannot be read or lacks a key, or an array has the wrong dtype, shape or labels. The
            message names the file and the key.
    """
    arrays = _npz_arrays(path)
    train_images, test_images = (_npz_images(arrays[key], f"{path}: {key}") for key in ("train_x", "test_x"))
    train_labels, test_labels = (_npz_labels(arrays[key], f"{path}: {key}") for key in ("train_y", "test_y"))
    class_indices(f"{path}: train_y", train_labels, len(train_images))
    class_indices(f"{path}: test_y", test_labels, len(test_images))
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


def _npz_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
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


def _npz_images(array: NDArray[np.generic], where: str) -> Tensor:
    if array.dtype != np.uint8:
        raise ValueError(f"{where}: got dtype {array.dtype}, expected uint8 pixels from 0 to 255; convert them first")
    if array.ndim == 4 and array.shape[3] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] != 3 or array.shape[1] == 0 or array.shape[2] == 0:
        raise ValueError(f"{where}: got shape {array.shape}, expected (n, height, width, 3) or (n, 3, height, width)")
    return torch.from_numpy(np.ascontiguousarray(array))


def _npz_labels(array: NDArray[np.generic], where: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{where}: got dtype {array.dtype} and shape {array.shape}, expected integers of shape (n,)")
    return torch.from_numpy(array.astype(np.int64))


def _abridged(values: Sequence[object]) -> str:
    shown = ", ".join(map(str, values[:10]))
    return f"[{shown}{', ...' if len(values) > 10 else ''}]"


def read_digits() -> Splits:
    """Return 1,797 digits of 8x8 pixels and 17 grey levels, enlarged to 32x32 RGB; the test set has 20 % of each class.

    Raises:
        ImportError: if scikit-learn is missing.
    """
    with extra("examples"):
        from sklearn.datasets import load_digits
    bunch = load_digits()
    labels = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))
    images = _enlarged(torch.from_numpy(np.asarray(bunch.images, dtype=np.float32)))
    # numpy guarantees that RandomState gives the same numbers in all versions, so the split is the same everywhere.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = order[labels[order] == label]
        test[members[: round(len(members) / 5)]] = True
    train_order, test_order = order[~test[order]], order[test[order]]
    return Splits(images[train_order], labels[train_order], images[test_order], labels[test_order], num_classes=10)


def _enlarged(levels: Tensor) -> Tensor:
    # Levels are integers up to 16, and interpolation weights are multiples of 1/64. So every float here is exact, and
    # the rounded pixels do not depend on the machine.
    grey = interpolate(levels[:, None], size=(32, 32), mode="bilinear", align_corners=False)
    return (grey * 255 / 16).round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3)


FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_TIMEOUT = 10.0  # limit in seconds for a silent connection; torchvision does not set one


def read_torchvision(name: str, root: Path) -> Splits:
    """Read ``root/cifar-10-batches-py`` or ``root/cifar-100-python``.

    Raises:
        ImportError: if torchvision is missing.
        RuntimeError: if a file is missing or its checksum is wrong.
    """
    cifar = _torchvision_class(name)
    train, test = (cifar(str(root), train=train, download=False) for train in (True, False))
    train_images, test_images = (torch.from_numpy(np.ascontiguousarray(split.data)) for split in (train, test))
    train_labels, test_labels = (torch.tensor(split.targets, dtype=torch.int64) for split in (train, test))
    return Splits(train_images, train_labels, test_images, test_labels, num_classes=len(train.classes))


def download_torchvision(name: str, root: Path) -> None:
    """Download the folder that `read_torchvision` reads.

    The files are downloaded, unpacked and checked in a temporary folder inside ``root``, and moved at the end. So a
    failure does not change ``root``.

    Raises:
        Exception: any error of torchvision, the network or the file system.
    """
    cifar = _torchvision_class(name)
    existed = root.is_dir()
    root.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    try:
        if timeout is None:
            socket.setdefaulttimeout(_TIMEOUT)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
            cifar(scratch, download=True)
            target = root / FOLDERS[name]
            target.mkdir(exist_ok=True)
            for file in sorted(Path(scratch, FOLDERS[name]).iterdir()):
                os.replace(file, target / file.name)
    finally:
        socket.setdefaulttimeout(timeout)
        if not existed:
            with contextlib.suppress(OSError):  # rmdir fails if the folder holds the download
                root.rmdir()


def _torchvision_class(name: str) -> Any:
    with extra("train"):
        from torchvision import datasets
    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
