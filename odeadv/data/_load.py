"""Find a data set by name: the places to search, their order, and the advice if the data set is not found."""

from __future__ import annotations

import os
from pathlib import Path

from odeadv.data._dataset import ImageDataset, Splits
from odeadv.data._readers import (
    EXTENSIONS,
    FOLDERS,
    KEYS,
    download_torchvision,
    read_digits,
    read_folder,
    read_npz,
    read_torchvision,
)
from odeadv.support.checks import did_you_mean
from odeadv.support.extras import extra

_NAMES = ("cifar10", "cifar100", "digits", "folder")
_CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}
_CIFAR_SHAPE = (32, 32, 3)


class DatasetNotFoundError(FileNotFoundError):
    """A data set was not found. The message lists the searched places and says how to get the data set."""


def names() -> tuple[str, ...]:
    """Return the names of data sets that `load` accepts."""
    return _NAMES


def load(name: str, root: str | os.PathLike[str] | None = None, *, download: bool = True) -> ImageDataset:
    """Load a data set into memory.

    Args:
        name: ``"cifar10"`` or ``"cifar100"`` tries four sources in this order. (1) The archive ``root/<name>.npz`` with
            the keys ``train_x, train_y, test_x, test_y`` and ``uint8`` images NHWC or NCHW. (2) torchvision's unpacked
            folder in ``root``. (3) An image folder ``root/<name>/{train,test}/<class>/*.png`` (or another suffix that
            torchvision's ImageFolder reads). (4) torchvision's download.
            ``"folder"`` reads your own images with any number of classes: ``root`` is an image folder that contains
            ``train`` and ``test``, or an ``.npz`` file, both as above.
            ``"digits"`` is scikit-learn's digits, enlarged to 32x32 RGB; ``root`` is not used.
        root: the folder to search (and to download to). ``None`` means ``$ODEADV_DATA`` or ``~/.cache/odeadv/data``.
            ``"folder"`` needs a root.
        download: True allows torchvision to download CIFAR if it is not in ``root``.

    Raises:
        ValueError: if the name is unknown, or the data have the wrong dtype, shape, labels or image sizes; the message
            names the file.
        TypeError: if ``name`` or ``root`` is of the wrong type.
        ImportError: if a package that this data set needs is missing.
        DatasetNotFoundError: if the data set was not found, and the download is off or failed.

    Example:
        >>> digits = odeadv.data.load("digits")
        >>> digits.train_images.shape, digits.num_classes
        (torch.Size([1438, 32, 32, 3]), 10)
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, expected one of {', '.join(_NAMES)}")
    if name not in _NAMES:
        near = did_you_mean(name, _NAMES, most=2)
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(_NAMES)}{near}")
    if root is not None and not isinstance(root, (str, os.PathLike)):
        raise TypeError(f"root: got {type(root).__name__}, expected a path or None")
    if name == "digits":
        return ImageDataset(name, "scikit-learn digits", *read_digits(), flip=False)
    with extra("train"):
        import numpy  # noqa: F401  # the readers use it
    if name == "folder":
        if root is None:
            raise ValueError('root: got None, expected the image folder or .npz file that "folder" is to read')
        return _load_folder(Path(root).expanduser())
    if root is None:
        root = os.environ.get("ODEADV_DATA") or "~/.cache/odeadv/data"
    return _load_cifar(name, Path(root).expanduser(), download)


def _load_folder(root: Path) -> ImageDataset:
    if root.suffix == ".npz" and root.is_file():
        return ImageDataset("folder", "npz archive", *read_npz(root, None), flip=True)
    reason = _image_folder_missing(root)
    if reason is None:
        return ImageDataset("folder", "image folder", *read_folder(root), flip=True)
    if root.suffix == ".npz":
        looked = [f"{root} (npz archive): no such file"]
    else:
        looked = [f"{root / '{train,test}' / '<class>'} (image folder): {reason}"]
    raise _not_found("folder", looked, None, [_npz_way(root.with_suffix(".npz")), _folder_way(root.with_suffix(""))])


def _load_cifar(name: str, root: Path, download: bool) -> ImageDataset:
    if root.exists() and not root.is_dir():
        raise ValueError(f"root: got the file {root}, expected the folder to look for {name} in; pass its parent")
    archive, unpacked, folder = root / f"{name}.npz", root / FOLDERS[name], root / name
    if archive.exists():
        return _cifar(name, "npz archive", read_npz(archive, _CIFAR_CLASSES[name]), archive)
    looked = [f"{archive} (npz archive): no such file"]

    reason: str | None = "no such folder"
    if unpacked.exists():
        try:
            return _cifar(name, "torchvision", read_torchvision(name, root), unpacked)
        except (ImportError, RuntimeError) as error:
            reason = str(error)
    looked.append(f"{unpacked} (torchvision's unpacked folder): {reason}")

    reason = _image_folder_missing(folder)
    if reason is None:
        return _cifar(name, "image folder", read_folder(folder), folder)
    looked.append(f"{folder / '{train,test}' / '<class>'} (image folder): {reason}")

    failure: Exception | None = None
    if download:
        try:
            download_torchvision(name, root)
            return _cifar(name, "torchvision", read_torchvision(name, root), unpacked)
        # The user needs the same advice for every cause (network, disk, missing package); the cause is chained.
        except Exception as error:
            failure = error
    outcome = f"failed, {type(failure).__name__}: {failure}" if failure else "not tried, because download=False"
    ways = [
        f'call odeadv.data.load("{name}", root) with download=True on a machine with internet access and torchvision '
        f"installed; it writes root/{FOLDERS[name]}, which you can copy to {root}",
        _npz_way(archive),
        _folder_way(folder),
    ]
    raise _not_found(name, looked, f"Download by torchvision to {root}: {outcome}", ways) from failure


def _cifar(name: str, source: str, splits: Splits, path: Path) -> ImageDataset:
    if splits.num_classes != _CIFAR_CLASSES[name]:
        raise ValueError(f"{path}: got {splits.num_classes} classes, expected the {_CIFAR_CLASSES[name]} of {name}")
    shape = tuple(splits.train_images.shape[1:])
    if shape != _CIFAR_SHAPE:
        raise ValueError(
            f"{path}: got images of height, width, channels {shape}, expected {_CIFAR_SHAPE} for {name}; "
            'load images of another size as "folder"'
        )
    return ImageDataset(name, source, *splits, flip=True)


def _image_folder_missing(root: Path) -> str | None:
    if not root.is_dir():
        return "no such folder"
    missing = [split for split in ("train", "test") if not (root / split).is_dir()]
    return f"the folder lacks {' and '.join(missing)}" if missing else None


def _npz_way(path: Path) -> str:
    return (
        f"put an archive with the keys {', '.join(KEYS)} (uint8 images (n, height, width, 3), integer labels) at {path}"
    )


def _folder_way(path: Path) -> str:
    extensions = ", ".join(EXTENSIONS)
    return f"put images ({extensions}) in {path / 'train' / '<class>'} and {path / 'test' / '<class>'}"


def _not_found(name: str, looked: list[str], download: str | None, ways: list[str]) -> DatasetNotFoundError:
    parts = [f"root: data set {name!r} was not found. Looked for: {'; '.join(looked)}."]
    if download is not None:
        parts.append(f"{download}.")
    parts.append(f"To get it: {'; '.join(f'({number}) {way}' for number, way in enumerate(ways, start=1))}")
    return DatasetNotFoundError(" ".join(" ".join(parts).split()))
