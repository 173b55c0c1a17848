"""Reading a folder of image files, ``{train,test}/<class>/<image>``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from odeadv.data._splits import Splits
from odeadv.data.checks import require

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


def read_folder(root: Path) -> Splits:
    """Read ``root/train`` and ``root/test``; a class is a subfolder, numbered in the order of the names in ``train``.

    Greyscale, palette and transparent images are converted to RGB. Files with other extensions and names that start
    with a dot are passed over.

    Raises:
        ImportError: Pillow is missing.
        ValueError: fewer than two classes, a class without images, a test class that ``train`` does not have, a file
            that is not an 8-bit image, or one whose size differs from the first. The message names the file.
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
    first = train_files[0][0]
    shape = _pixels(first).shape
    train_images, train_labels = _read(train_files, first, shape)
    test_images, test_labels = _read(test_files, first, shape)
    return Splits(train_images, train_labels, test_images, test_labels, len(classes))


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))


def _read(files: list[list[Path]], first: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
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
    pillow = require("PIL.Image", "pillow", "reading image files")
    try:
        with pillow.open(path) as image:
            mode = image.mode
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error
    # Pillow's conversion clips these modes to 255 instead of scaling them.
    if mode.startswith(("I", "F")):
        raise ValueError(f"{path}: got an image of mode {mode!r}, expected 8 bits per channel; convert it first")
    return pixels
