"""The data sets and batches of `odeadv.data`: reading, refusals and augmentation."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import re
import sys
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import seeded
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from odeadv import data
from odeadv.data import Batches, DatasetNotFoundError, ImageDataset, random_crop_flip, to_float
from odeadv.data._batches import Window, draw_epoch
from odeadv.data.stream import Stream

Arrays = dict[str, NDArray[Any]]

pytestmark = pytest.mark.filterwarnings("ignore:.*lacks images of:UserWarning")


def pixels(n: int, height: int = 32, width: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def tensor_pixels(n: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.from_numpy(pixels(n, height, width))


def numbered(n: int) -> tuple[Tensor, Tensor]:
    """1x1 images whose red value and label are both the sample's number."""
    images = torch.zeros(n, 1, 1, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n)
    return images, torch.arange(n)


def arrays(**changes: NDArray[Any]) -> Arrays:
    base: Arrays = {
        "train_x": pixels(20, seed=1),
        "train_y": np.arange(20) % 10,
        "test_x": pixels(7, seed=2),
        "test_y": np.arange(7) % 10,
    }
    return base | changes


def save(path: Path, content: Arrays) -> Path:
    np.savez(path, **content)  # type: ignore[arg-type]
    return path


def dataset(train_labels: list[int], test_labels: list[int], num_classes: int, name: str = "toy") -> ImageDataset:
    return ImageDataset(
        name,
        "npz archive",
        tensor_pixels(len(train_labels), 2, 2),
        torch.tensor(train_labels),
        tensor_pixels(len(test_labels), 2, 2),
        torch.tensor(test_labels),
        num_classes=num_classes,
        flip=True,
    )


def write_folder(root: Path, content: dict[str, list[NDArray[np.uint8]]], extension: str = "png") -> None:
    """Write ``{"train/cat": [image, ...]}`` below ``root``."""
    for place, images in content.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            Image.fromarray(image).save(root / place / f"{index:03d}.{extension}")


def toy_folder(root: Path) -> dict[str, list[NDArray[np.uint8]]]:
    images = list(pixels(6, 5, 4))
    content = {"train/b": images[:2], "train/a": images[2:4], "train/c": images[4:5], "test/b": images[5:]}
    write_folder(root, content)
    return content


class TestDigits:
    def test_shapes_split_and_origin(self) -> None:
        digits = data.load("digits")
        assert (digits.name, digits.source, digits.num_classes, digits.flip) == (
            "digits",
            "scikit-learn digits",
            10,
            False,
        )
        assert digits.train_images.shape == (1438, 32, 32, 3)
        assert digits.test_images.shape == (359, 32, 32, 3)
        assert digits.train_images.dtype == torch.uint8
        assert digits.train_labels.dtype == torch.int64
        train, test = torch.bincount(digits.train_labels), torch.bincount(digits.test_labels)
        assert bool(((test / (train + test) - 0.2).abs() < 0.005).all())

    def test_the_same_everywhere_and_without_the_global_generator(self) -> None:
        state = torch.random.get_rng_state()
        first = data.load("digits")
        assert first.fingerprint() == data.load("digits").fingerprint() == "513bfd1f585d44a8"
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_holds_every_original_digit_enlarged_with_its_label(self) -> None:
        from sklearn.datasets import load_digits

        original = load_digits()
        levels = torch.tensor(np.array(original.images))[:, None]
        smooth = torch.nn.functional.interpolate(levels, scale_factor=4, mode="bilinear")[:, 0]
        enlarged = (smooth / 16 * 255).round().long().flatten(1).tolist()
        expected = {tuple(image): int(label) for image, label in zip(enlarged, original.target, strict=True)}
        digits = data.load("digits")
        images = torch.cat((digits.train_images, digits.test_images)).long()
        labels = torch.cat((digits.train_labels, digits.test_labels)).tolist()
        for channel in range(3):
            found = images[..., channel].flatten(1).tolist()
            assert {tuple(image): label for image, label in zip(found, labels, strict=True)} == expected
        assert len(expected) == len(labels) == 1797

    def test_without_scikit_learn_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r"sklearn: is not installed.*'odeadv\[examples\]'"):
            data.load("digits")


class TestArchive:
    def test_round_trip(self, tmp_path: Path) -> None:
        content = arrays()
        save(tmp_path / "cifar10.npz", content)
        loaded = data.load("cifar10", tmp_path, download=False)
        assert (loaded.name, loaded.source, loaded.num_classes, loaded.flip) == ("cifar10", "npz archive", 10, True)
        parts = (loaded.train_images, loaded.train_labels, loaded.test_images, loaded.test_labels)
        for key, part in zip(content, parts, strict=True):
            assert np.array_equal(part.numpy(), content[key]), key
        assert loaded.train_labels.dtype == torch.int64
        assert str(loaded) == "ImageDataset('cifar10' from npz archive: 20 train, 7 test, 32x32, 10 classes)"

    @pytest.mark.parametrize("dtype", [np.uint8, np.int32, ">i2", np.uint64])
    def test_labels_of_any_integer_type(self, tmp_path: Path, dtype: Any) -> None:
        labels = np.arange(20) * 5
        save(tmp_path / "cifar100.npz", arrays(train_y=labels.astype(dtype)))
        assert data.load("cifar100", str(tmp_path)).train_labels.tolist() == labels.tolist()

    def test_channels_first_is_converted(self, tmp_path: Path) -> None:
        content = arrays()
        turned = {key: content[key].transpose(0, 3, 1, 2) for key in ("train_x", "test_x")}
        save(tmp_path / "cifar10.npz", content | turned)
        loaded = data.load("cifar10", tmp_path)
        assert np.array_equal(loaded.train_images.numpy(), content["train_x"])
        assert loaded.train_images.is_contiguous()
        assert loaded.test_images.is_contiguous()

    def test_as_a_folder_dataset_counts_its_classes(self, tmp_path: Path) -> None:
        path = save(
            tmp_path / "mine.npz",
            arrays(
                train_x=pixels(20, 8, 6), train_y=np.arange(20) % 4, test_x=pixels(7, 8, 6), test_y=np.arange(7) % 4
            ),
        )
        loaded = data.load("folder", path)
        assert (loaded.name, loaded.source, loaded.num_classes, loaded.flip) == ("folder", "npz archive", 4, True)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train_x": pixels(20).astype(np.float32)}, r"train_x: got dtype float32, expected uint8"),
            ({"test_x": pixels(7)[..., 0]}, r"test_x: got shape \(7, 32, 32\), expected \(n, height, width, 3\) or"),
            ({"test_x": pixels(7)[..., :2]}, r"test_x: got shape \(7, 32, 32, 2\)"),
            ({"train_y": np.arange(20) / 10}, r"train_y: got dtype float64 and shape \(20,\), expected integers"),
            ({"train_y": np.zeros((20, 1), dtype=int)}, r"train_y: got dtype int64 and shape \(20, 1\), expected"),
            ({"train_y": np.zeros(19, dtype=int)}, r"train_y: got shape \(19,\), expected \(20,\), one per image"),
            ({"test_y": np.zeros(8, dtype=int)}, r"test_y: got shape \(8,\), expected \(7,\)"),
            ({"train_y": np.arange(20) % 11}, r"train_y: got labels from 0 to 10, expected 0 to 9"),
            ({"test_y": np.arange(7) - 1}, r"test_y: got labels from -1 to 5, expected 0 to 9"),
            ({"train_x": pixels(0), "train_y": np.zeros(0, dtype=int)}, r"train_y: got no samples"),
            ({"test_x": pixels(0), "test_y": np.zeros(0, dtype=int)}, r"test_y: got no samples"),
            ({"test_x": pixels(7, 16, 32)}, r"test_x: got images of .* \(16, 32, 3\), expected those of train_x"),
            (
                {"train_x": pixels(20, 16, 16), "test_x": pixels(7, 16, 16)},
                r"expected \(32, 32, 3\) for cifar10; load .* as \"folder\"",
            ),
        ],
    )
    def test_wrong_arrays_are_refused(self, tmp_path: Path, changes: Arrays, message: str) -> None:
        save(tmp_path / "cifar10.npz", arrays(**changes))
        with pytest.raises(ValueError, match=rf"cifar10\.npz: .*{message}|cifar10\.npz: {message}"):
            data.load("cifar10", tmp_path)

    @pytest.mark.parametrize("labels", [np.arange(20) % 4 + 1, np.arange(20) % 2 * 2, np.zeros(20, dtype=int)])
    def test_classes_left_out_are_refused(self, tmp_path: Path, labels: NDArray[Any]) -> None:
        path = save(tmp_path / "mine.npz", arrays(train_y=labels, test_y=np.zeros(7, dtype=int)))
        with pytest.raises(ValueError, match=r"mine\.npz: train_y: got the \d distinct labels \[.*expected 0 to K-1"):
            data.load("folder", path)

    def test_a_class_only_in_the_test_set_is_refused(self, tmp_path: Path) -> None:
        path = save(tmp_path / "mine.npz", arrays(train_y=np.arange(20) % 3, test_y=np.arange(7) % 4))
        with pytest.raises(ValueError, match=r"test_y: got labels from 0 to 3, expected 0 to 2"):
            data.load("folder", path)

    def test_missing_key(self, tmp_path: Path) -> None:
        content = arrays()
        del content["test_y"]
        save(tmp_path / "cifar10.npz", content)
        with pytest.raises(
            ValueError, match=r"cifar10\.npz: lacks test_y; got the keys \[train_x.*expected train_x, train_y"
        ):
            data.load("cifar10", tmp_path)

    def test_pickles_are_not_loaded(self, tmp_path: Path) -> None:
        save(tmp_path / "cifar10.npz", arrays(train_y=np.array([[0], "a"] * 10, dtype=object)))
        with pytest.raises(ValueError, match=r"cifar10\.npz: cannot be read as an \.npz archive of plain arrays"):
            data.load("cifar10", tmp_path)

    def test_broken_files(self, tmp_path: Path) -> None:
        whole = save(tmp_path / "whole.npz", arrays()).read_bytes()
        plain = tmp_path / "plain.npy"
        np.save(plain, pixels(2))
        for content in (b"", b"not an archive", whole[: len(whole) // 2], plain.read_bytes()):
            (tmp_path / "cifar10.npz").write_bytes(content)
            with pytest.raises(ValueError, match=r"cifar10\.npz: cannot be read .* numpy\.savez"):
                data.load("cifar10", tmp_path)


class TestImageFolder:
    def test_round_trip(self, tmp_path: Path) -> None:
        content = toy_folder(tmp_path)
        (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
        (tmp_path / "train" / ".cache").mkdir()
        loaded = data.load("folder", tmp_path)
        assert (loaded.name, loaded.source, loaded.num_classes, loaded.flip) == ("folder", "image folder", 3, True)
        expected = np.stack(content["train/a"] + content["train/b"] + content["train/c"])
        assert np.array_equal(loaded.train_images.numpy(), expected)
        assert loaded.train_labels.tolist() == [0, 0, 1, 1, 2]
        assert np.array_equal(loaded.test_images.numpy(), np.stack(content["test/b"]))
        assert loaded.test_labels.tolist() == [1]

    def test_other_formats_and_modes(self, tmp_path: Path) -> None:
        toy_folder(tmp_path)
        grey = np.full((5, 4), 77, dtype=np.uint8)
        Image.fromarray(grey).save(tmp_path / "train" / "c" / "100.WEBP", format="WEBP", lossless=True)
        Image.fromarray(grey).save(tmp_path / "train" / "c" / "101.jpg", quality=100)
        Image.fromarray(grey).save(tmp_path / "train" / "c" / "102.jpeg", quality=100)
        Image.fromarray(np.dstack([grey] * 4)).save(tmp_path / "train" / "c" / "103.png")
        loaded = data.load("folder", tmp_path)
        assert len(loaded.train_labels) == 9
        assert (loaded.train_images[-4:].int() - 77).abs().max() <= 1

    @pytest.mark.parametrize("extension", ["bmp", "tiff", "tif", "ppm"])
    def test_other_formats_of_torchvision_are_read(self, tmp_path: Path, extension: str) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
        write_folder(
            tmp_path, {f"{split}/{name}": list(pixels) for split in ("train", "test") for name in "ab"}, extension
        )
        loaded = data.load("folder", tmp_path)
        assert torch.equal(loaded.train_images[:2], torch.from_numpy(pixels))

    def test_skipped_files_are_counted_by_suffix_and_a_missing_class_is_named(self, tmp_path: Path) -> None:
        image = [np.zeros((4, 4, 3), np.uint8)]
        write_folder(tmp_path, {"train/a": image, "train/b": image, "test/a": image})
        for name in ("train/a/x.gif", "train/a/y.gif", "test/a/notes.txt", "train/README", "train/.DS_Store"):
            (tmp_path / name).write_bytes(b"?")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert len(data.load("folder", tmp_path).train_images) == 2
        text = " ".join(str(each.message) for each in said)
        assert re.search(
            r"4 files are skipped \(2 with \.gif, 1 with (\.txt|no suffix), 1 with (no suffix|\.txt)\)", text
        )
        assert "lacks images of 1 of 2 classes: [b]" in text

    def test_images_in_subfolders_of_a_class_are_read(self, tmp_path: Path) -> None:
        image = [np.zeros((4, 4, 3), np.uint8)]
        write_folder(
            tmp_path, {"train/a": image, "train/a/more": image, "train/b": image, "test/a": image, "test/b": image}
        )
        assert data.load("folder", tmp_path).train_labels.tolist() == [0, 0, 1]

    def test_as_cifar(self, tmp_path: Path) -> None:
        images = pixels(11)
        content = {f"train/class{i}": [images[i]] for i in range(10)} | {"test/class3": [images[10]]}
        write_folder(tmp_path / "cifar10", content)
        loaded = data.load("cifar10", tmp_path, download=False)
        assert (loaded.name, loaded.source) == ("cifar10", "image folder")
        assert np.array_equal(loaded.train_images.numpy(), images[:10])
        assert loaded.test_labels.tolist() == [3]

    def test_cifar_with_other_classes_is_refused(self, tmp_path: Path) -> None:
        toy_folder(tmp_path / "cifar10")
        with pytest.raises(ValueError, match=r"cifar10: got 3 classes, expected the 10 of cifar10"):
            data.load("cifar10", tmp_path, download=False)

    def test_another_size_names_the_file(self, tmp_path: Path) -> None:
        toy_folder(tmp_path)
        odd = tmp_path / "test" / "a" / "odd.png"
        odd.parent.mkdir()
        Image.fromarray(pixels(1, 6, 4)[0]).save(odd)
        with pytest.raises(ValueError, match=r"odd\.png: got 6x4 pixels .* expected 5x4 as in .*000\.png; all images"):
            data.load("folder", tmp_path)

    def test_unreadable_and_deep_images_name_the_file(self, tmp_path: Path) -> None:
        toy_folder(tmp_path)
        bad = tmp_path / "train" / "b" / "bad.png"
        bad.write_bytes((tmp_path / "train" / "b" / "000.png").read_bytes()[:60])
        with pytest.raises(ValueError, match=r"bad\.png: cannot be read as an image"):
            data.load("folder", tmp_path)
        Image.fromarray(np.full((5, 4), 4000, dtype=np.uint16)).save(bad)
        with pytest.raises(ValueError, match=r"bad\.png: got an image of mode 'I;16', expected 8 bits per channel"):
            data.load("folder", tmp_path)

    def test_classes_are_checked(self, tmp_path: Path) -> None:
        toy_folder(tmp_path)
        (tmp_path / "test" / "dog").mkdir()
        with pytest.raises(ValueError, match=r"test: got the class folders \['dog'\], which .*train does not have"):
            data.load("folder", tmp_path)
        (tmp_path / "train" / "dog").mkdir()
        with pytest.raises(ValueError, match=r"dog: got no images, expected files ending in \.png"):
            data.load("folder", tmp_path)

    def test_one_class_or_an_empty_test_set(self, tmp_path: Path) -> None:
        image = list(pixels(1, 4, 4))
        write_folder(tmp_path, {"train/a": image, "test/a": image})
        with pytest.raises(ValueError, match=r"train: got the class folders \['a'\], expected at least two"):
            data.load("folder", tmp_path)
        write_folder(tmp_path, {"train/b": image})
        (tmp_path / "test" / "a" / "000.png").unlink()
        with pytest.raises(ValueError, match=r"test: got no images, expected <class>/<image>"):
            data.load("folder", tmp_path)

    def test_without_pillow_says_how_to_get_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        toy_folder(tmp_path)
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ImportError, match=r"PIL: is not installed.*'odeadv\[train\]'"):
            data.load("folder", tmp_path)


@pytest.fixture
def torchvision_cifar(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Arrays]:
    """A writer of torchvision's unpacked CIFAR-10 folder with other pixels, whose checksums torchvision accepts."""
    from torchvision.datasets import CIFAR10

    content = arrays()

    def packed(value: object) -> tuple[bytes, str]:
        raw = pickle.dumps(value)
        return raw, hashlib.md5(raw, usedforsecurity=False).hexdigest()

    files: dict[str, bytes] = {}
    for split, attribute in (("train", "train_list"), ("test", "test_list")):
        planes = content[f"{split}_x"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        files[split], md5 = packed({"data": planes, "labels": content[f"{split}_y"].tolist()})
        monkeypatch.setattr(CIFAR10, attribute, [[split, md5]])
    files["batches.meta"], md5 = packed({"label_names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})

    def write(root: Path) -> Arrays:
        (root / "cifar-10-batches-py").mkdir(parents=True, exist_ok=True)
        for name, raw in files.items():
            (root / "cifar-10-batches-py" / name).write_bytes(raw)
        return content

    return write


def replace_download(monkeypatch: pytest.MonkeyPatch, action: Callable[[Path], object]) -> list[Path]:
    """Let torchvision's download run ``action`` on its folder instead of using the network; return the folders."""
    called: list[Path] = []

    def download(url: str, root: str, **options: object) -> None:
        called.append(Path(root))
        action(Path(root))

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
    return called


class TestTorchvision:
    def test_unpacked_folder(self, tmp_path: Path, torchvision_cifar: Callable[[Path], Arrays]) -> None:
        content = torchvision_cifar(tmp_path)
        loaded = data.load("cifar10", tmp_path, download=False)
        assert (loaded.name, loaded.source, loaded.num_classes) == ("cifar10", "torchvision", 10)
        assert np.array_equal(loaded.train_images.numpy(), content["train_x"])
        assert np.array_equal(loaded.test_images.numpy(), content["test_x"])
        assert loaded.test_labels.tolist() == content["test_y"].tolist()

    def test_order_of_the_places(self, tmp_path: Path, torchvision_cifar: Callable[[Path], Arrays]) -> None:
        images = pixels(1)
        write_folder(tmp_path / "cifar10", {f"train/{i}": list(images) for i in range(10)} | {"test/0": list(images)})
        assert data.load("cifar10", tmp_path).source == "image folder"
        torchvision_cifar(tmp_path)
        assert data.load("cifar10", tmp_path).source == "torchvision"
        save(tmp_path / "cifar10.npz", arrays())
        assert data.load("cifar10", tmp_path).source == "npz archive"

    def test_download(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torchvision_cifar: Callable[[Path], Arrays]
    ) -> None:
        called = replace_download(monkeypatch, torchvision_cifar)
        root = tmp_path / "cache"
        monkeypatch.setenv("ODEADV_DATA", str(root))
        first = data.load("cifar10")
        assert first.source == "torchvision"
        assert len(first.train_labels) == 20
        assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]
        assert data.load("cifar10", download=False).fingerprint() == first.fingerprint()
        assert len(called) == 1
        assert called[0].parent == root

    def test_download_repairs_a_damaged_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torchvision_cifar: Callable[[Path], Arrays]
    ) -> None:
        torchvision_cifar(tmp_path)
        (tmp_path / "cifar-10-batches-py" / "test").write_bytes(b"damaged")
        with pytest.raises(DatasetNotFoundError, match=r"unpacked folder\): Dataset not found or corrupted"):
            data.load("cifar10", tmp_path, download=False)
        replace_download(monkeypatch, torchvision_cifar)
        assert len(data.load("cifar10", tmp_path).test_labels) == 7

    @pytest.mark.parametrize("existing", [True, False])
    def test_failed_download_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
    ) -> None:
        def fail(folder: Path) -> None:
            (folder / "cifar-10-python.tar.gz").write_bytes(b"half of it")
            raise urllib.error.URLError("no route to host")

        called = replace_download(monkeypatch, fail)
        root = tmp_path / "root"
        if existing:
            root.mkdir()
        with pytest.raises(DatasetNotFoundError) as caught:
            data.load("cifar10", root)
        message = str(caught.value)
        for place in ("cifar10.npz (npz", "cifar-10-batches-py (torch", "cifar10/{train,test}/<class> (image folder)"):
            assert f"{root}/{place}" in message
        assert "no such file" in message
        assert "no such folder" in message
        assert f"Download by torchvision to {root}: failed, URLError: <urlopen error no route to host>" in message
        for way in (
            "(1) call odeadv.data.load",
            "machine with internet",
            "(2) put an archive",
            "train_x, train_y, test_x",
            "(3) put images",
        ):
            assert way in message
        assert isinstance(caught.value, FileNotFoundError)
        assert isinstance(caught.value.__cause__, urllib.error.URLError)
        assert len(called) == 1
        assert list(tmp_path.rglob("*")) == ([root] if existing else [])

    def test_interrupted_download_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(folder: Path) -> None:
            (folder / "cifar-10-batches-py").mkdir()
            raise KeyboardInterrupt

        replace_download(monkeypatch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.load("cifar10", tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_download_waits_for_a_limited_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import socket

        limits: list[float | None] = []

        def fail(_: Path) -> None:
            limits.append(socket.getdefaulttimeout())
            raise TimeoutError("silent")

        replace_download(monkeypatch, fail)
        before = socket.getdefaulttimeout()
        try:
            for own in (None, 3.0):
                socket.setdefaulttimeout(own)
                with pytest.raises(DatasetNotFoundError, match=r"failed, TimeoutError: silent"):
                    data.load("cifar10", tmp_path)
                assert socket.getdefaulttimeout() == own
        finally:
            socket.setdefaulttimeout(before)
        assert limits == [10.0, 3.0]

    def test_download_off(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        called = replace_download(monkeypatch, lambda folder: None)
        (tmp_path / "cifar100" / "train").mkdir(parents=True)
        with pytest.raises(DatasetNotFoundError) as caught:
            data.load("cifar100", tmp_path, download=False)
        assert "not tried, because download=False" in str(caught.value)
        assert "(image folder): the folder lacks test" in str(caught.value)
        assert called == []

    def test_without_torchvision(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchvision", None)
        with pytest.raises(
            DatasetNotFoundError, match=r"failed, ModuleNotFoundError: torchvision: .*'odeadv\[train\]'"
        ):
            data.load("cifar10", tmp_path)
        (tmp_path / "cifar-10-batches-py").mkdir()
        with pytest.raises(DatasetNotFoundError, match=r"unpacked folder\): torchvision: .*'odeadv\[train\]'"):
            data.load("cifar10", tmp_path, download=False)


class TestLoadArguments:
    def test_names(self) -> None:
        assert data.names() == ("cifar10", "cifar100", "digits", "folder")

    @pytest.mark.parametrize(
        ("name", "hint"),
        [("cifar-10", "did you mean 'cifar10'"), ("CIFAR10", "did you mean 'cifar10'"), ("mnist", "folder$")],
    )
    def test_unknown_name_lists_near_matches(self, name: str, hint: str) -> None:
        with pytest.raises(ValueError, match=rf"name: got '{name}', expected one of cifar10, cifar100, digits.*{hint}"):
            data.load(name)

    def test_wrong_types(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"name: got int, expected one of cifar10"):
            data.load(10)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"root: got int, expected a path or None"):
            data.load("cifar10", 10)  # type: ignore[arg-type]

    def test_root_must_fit_the_name(self, tmp_path: Path) -> None:
        path = save(tmp_path / "cifar10.npz", arrays())
        with pytest.raises(ValueError, match=r"root: got the file .*cifar10\.npz, .*pass its parent"):
            data.load("cifar10", path)
        with pytest.raises(ValueError, match=r"root: got None, expected the image folder or \.npz file"):
            data.load("folder")

    @pytest.mark.parametrize(
        ("root", "reason"),
        [
            ("absent", "no such folder"),
            ("absent.npz", "no such file"),
            (".", "the folder lacks train and test"),
        ],
    )
    def test_folder_not_found(self, tmp_path: Path, root: str, reason: str) -> None:
        with pytest.raises(DatasetNotFoundError) as caught:
            data.load("folder", tmp_path / root)
        message = str(caught.value)
        assert reason in message
        assert str(tmp_path / root) in message
        assert "(1) put an archive" in message
        assert "(2) put images" in message
        assert "Download" not in message


class TestImageDataset:
    def test_resized_takes_the_mean_of_areas(self) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (5, 32, 32, 3), generator=generator, dtype=torch.uint8)
        data = ImageDataset("mine", "here", pixels, torch.arange(5) % 2, pixels[:2], torch.arange(2), 2, False)
        small = data.resized(8)
        exact = torch.nn.functional.avg_pool2d(pixels.permute(0, 3, 1, 2).double(), 4).permute(0, 2, 3, 1)
        assert torch.equal(small.train_images, (exact + 0.5).floor().to(torch.uint8))
        assert small.test_images.shape == (2, 8, 8, 3)
        assert torch.equal(small.train_labels, data.train_labels)
        assert small.fingerprint() != data.fingerprint()
        assert torch.equal(data.resized(32).train_images, pixels)
        with pytest.raises(ValueError, match="size: got 12, expected a divisor of height and width, 32 and 32"):
            data.resized(12)

    def test_cifar_statistics_are_the_published_ones(self) -> None:
        toy = dataset([0, 1], [0], 10, name="cifar10")
        assert toy.mean == (0.4914, 0.4822, 0.4465)
        assert toy.std == (0.2470, 0.2435, 0.2616)
        assert dataset([0, 1], [0], 100, name="cifar100").std == (0.2673, 0.2564, 0.2762)

    def test_other_statistics_are_measured_on_the_training_set(self) -> None:
        toy = dataset([0, 1, 0, 1, 1], [0], 2)
        scaled = toy.train_images.double() / 255
        assert toy.mean == pytest.approx(scaled.mean((0, 1, 2)).tolist(), abs=1e-12)
        assert toy.std == pytest.approx(scaled.std((0, 1, 2), correction=0).tolist(), abs=1e-12)

    def test_a_constant_channel_can_be_divided_by(self) -> None:
        toy = dataset([0, 1], [0], 2)
        toy.train_images[..., 1] = 51
        assert dataclasses.replace(toy).mean[1] == 0.2
        assert dataclasses.replace(toy).std[1] == 1.0

    def test_subset_takes_the_first_of_each_class(self) -> None:
        toy = dataset([2, 2, 0, 0, 1, 2, 0, 1, 1, 2], [0, 0, 1, 1, 2], 3)
        small = toy.subset(train=6, test=3)
        assert small.train_labels.tolist() == [2, 2, 0, 0, 1, 1]
        assert torch.equal(small.train_images, toy.train_images[[0, 1, 2, 3, 4, 7]])
        assert torch.equal(small.test_images, toy.test_images[[0, 2, 4]])
        assert small.train_images.is_contiguous()
        assert toy.subset(train=6, test=3).fingerprint() == small.fingerprint()
        assert (small.name, small.source, small.num_classes, small.flip) == ("toy", "npz archive", 3, True)

    @pytest.mark.parametrize("count", range(1, 41))
    def test_subset_is_balanced_at_every_size(self, count: int) -> None:
        toy = dataset((torch.randperm(40, generator=seeded()) % 4).tolist(), [0], 4)
        sizes = torch.bincount(toy.subset(train=count).train_labels, minlength=4)
        assert int(sizes.sum()) == count
        assert int(sizes.max() - sizes.min()) <= 1

    def test_subset_fills_up_from_other_classes(self) -> None:
        toy = dataset([0, 1, 1, 1, 1, 1], [0, 1], 2)
        assert toy.subset(train=4).train_labels.tolist() == [0, 1, 1, 1]
        assert toy.subset().fingerprint() == toy.subset(6, 2).fingerprint() == toy.fingerprint()

    @pytest.mark.parametrize(
        ("counts", "error", "message"),
        [
            ({"train": 0}, ValueError, "train: got 0, expected an integer, at least 1"),
            ({"test": 3}, ValueError, "test: got 3, expected at most the 2 samples"),
            ({"train": 2.0}, TypeError, r"train: got 2\.0, expected an integer, at least 1"),
            ({"test": True}, TypeError, r"test: got True, expected an integer, at least 1"),
        ],
    )
    def test_subset_checks_its_counts(self, counts: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            dataset([0, 1], [0, 1], 2).subset(**counts)

    def test_fingerprint_sees_every_field_of_the_data(self) -> None:
        def changed(field: str) -> ImageDataset:
            toy = dataset([0, 1, 0], [0, 1], 2)
            part = getattr(toy, field)
            part.view(-1)[-1] = 1 - part.view(-1)[-1]
            return toy

        toy = dataset([0, 1, 0], [0, 1], 2)
        fields = ("train_images", "train_labels", "test_images", "test_labels")
        prints = [toy.fingerprint(), dataclasses.replace(toy, num_classes=3).fingerprint()]
        prints += [changed(field).fingerprint() for field in fields]
        assert len(set(prints)) == 6
        assert dataclasses.replace(toy, name="other").fingerprint() == toy.fingerprint()
        assert len(prints[0]) == 16

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"train_images": torch.zeros(2, 2, 2, 3)}, TypeError, r"train_images: got dtype torch\.float32"),
            ({"test_images": pixels(1, 2, 2)}, TypeError, "test_images: got ndarray, expected a uint8 tensor"),
            ({"test_images": tensor_pixels(1, 2, 2)[0]}, ValueError, r"test_images: got shape \(2, 2, 3\)"),
            ({"test_images": tensor_pixels(1, 3, 2)}, ValueError, r"test_images: got height.* \(3, 2, 3\)"),
            ({"train_images": tensor_pixels(2, 2, 2).flip(0).mT.contiguous().mT}, ValueError, "non-contiguous"),
            ({"train_labels": torch.tensor([0, 1]).int()}, TypeError, r"train_labels: got dtype torch\.int32"),
            ({"train_labels": [0, 1]}, TypeError, "train_labels: got list"),
            ({"train_labels": torch.tensor([0])}, ValueError, r"train_labels: got shape \(1,\), expected \(2,\)"),
            ({"test_labels": torch.tensor([2])}, ValueError, "test_labels: got labels from 2 to 2, expected 0 to 1"),
            ({"num_classes": 1}, ValueError, "num_classes: got 1, expected an integer, at least 2"),
        ],
    )
    def test_fields_are_checked(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            dataclasses.replace(dataset([0, 1], [0], 2), **changes)


class TestToFloat:
    def test_every_pixel_value_is_exact(self) -> None:
        images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
        result = to_float(images)
        assert result.shape == (1, 3, 16, 16)
        assert result.dtype == torch.float32
        assert result[0, 1].flatten().tolist() == [float(np.float32(np.float64(k) / 255)) for k in range(256)]

    @pytest.mark.parametrize("n", [1, 3])
    def test_layout(self, n: int) -> None:
        images = tensor_pixels(n, 4, 5)
        for view in (images, images.flip(2), images[:, :, ::2], images[:, :3]):
            result = to_float(view)
            assert result.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal((result * 255).round().byte(), view.permute(0, 3, 1, 2))

    def test_ignores_the_default_dtype(self) -> None:
        torch.set_default_dtype(torch.float64)
        try:
            assert to_float(tensor_pixels(1)).dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)

    def test_refuses_other_tensors(self) -> None:
        with pytest.raises(TypeError, match=r"images: got dtype torch\.float32, expected torch\.uint8"):
            to_float(torch.zeros(1, 4, 4, 3))
        with pytest.raises(ValueError, match=r"images: got shape \(1, 3, 4, 4\), expected \(n, height, width, 3\)"):
            to_float(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def cropped_slowly(images: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """One image at a time and one pixel at a time, with the documented order of the draws."""
    n, height, width, _ = images.shape
    top = torch.randint(2 * pad + 1, (n,), generator=generator).tolist()
    left = torch.randint(2 * pad + 1, (n,), generator=generator).tolist()
    mirrored = torch.randint(2, (n,), generator=generator).tolist() if flip else [0] * n
    result = torch.zeros_like(images)
    for i in range(n):
        for row in range(height):
            for column in range(width):
                y = row + top[i] - pad
                x = (width - 1 - column if mirrored[i] else column) + left[i] - pad
                if 0 <= y < height and 0 <= x < width:
                    result[i, row, column] = images[i, y, x]
    return result


class TestRandomCropFlip:
    @pytest.mark.parametrize(("pad", "flip"), [(0, True), (2, False), (2, True), (9, True)])
    def test_agrees_with_a_slow_loop(self, pad: int, flip: bool) -> None:
        images = tensor_pixels(30, 5, 7)
        result = random_crop_flip(images, pad=pad, flip=flip, generator=seeded(3))
        assert torch.equal(result, cropped_slowly(images, pad, flip, seeded(3)))
        assert result.dtype == torch.uint8
        assert result.is_contiguous()

    def test_views_are_read_correctly(self) -> None:
        images = tensor_pixels(6, 8, 5).transpose(1, 2)
        assert torch.equal(random_crop_flip(images, generator=seeded()), cropped_slowly(images, 4, True, seeded()))

    def test_every_crop_and_both_sides_are_equally_likely(self) -> None:
        one = tensor_pixels(1, 6, 6)
        result = random_crop_flip(one.expand(3600, 6, 6, 3), pad=1, generator=seeded())
        seen, counts = torch.unique(result.flatten(1), dim=0, return_counts=True)
        assert len(seen) == 18
        assert int(counts.min()) > 140  # 200 expected, standard deviation 14
        assert int(counts.max()) < 260

    def test_input_and_global_state_are_left_alone(self) -> None:
        images = tensor_pixels(4)
        before, state = images.clone(), torch.random.get_rng_state()
        random_crop_flip(images, generator=seeded())
        assert torch.equal(images, before)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_arguments_are_checked(self) -> None:
        images = tensor_pixels(2)
        with pytest.raises(ValueError, match=r"generator: got None, expected a torch\.Generator.*manual_seed"):
            random_crop_flip(images)
        with pytest.raises(TypeError, match=r"generator: got int, expected a torch\.Generator"):
            random_crop_flip(images, generator=0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"pad: got -1, expected an integer, at least 0"):
            random_crop_flip(images, pad=-1, generator=seeded())
        with pytest.raises(TypeError, match=r"images: got dtype torch\.float32"):
            random_crop_flip(images.float(), generator=seeded())


class TestBatches:
    @pytest.mark.parametrize("shuffle", [False, True])
    @pytest.mark.parametrize("drop_last", [False, True])
    @pytest.mark.parametrize("batch_size", [1, 4, 5, 23, 50])
    def test_every_sample_once_with_its_label(self, shuffle: bool, drop_last: bool, batch_size: int) -> None:
        if drop_last and batch_size > 23:
            return
        images, labels = numbered(23)
        batches = Batches(
            images, labels, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, generator=seeded()
        )
        seen = list(batches)
        sizes = [len(batch) for _, batch in seen]
        rest = 23 % batch_size
        assert sizes == [batch_size] * (23 // batch_size) + ([rest] if rest and not drop_last else [])
        assert len(batches) == len(sizes)
        order = torch.cat([batch for _, batch in seen])
        assert torch.equal(torch.cat([(x[:, 0, 0, 0] * 255).round().long() for x, _ in seen]), order)
        assert len(order.unique()) == len(order)  # type: ignore[no-untyped-call]
        if not shuffle:
            assert order.tolist() == list(range(len(order)))

    def test_epochs_have_different_orders_and_seeds_repeat_them(self) -> None:
        images, labels = numbered(40)

        def epochs(seed: int) -> list[list[int]]:
            batches = Batches(images, labels, batch_size=8, shuffle=True, generator=seeded(seed))
            return [torch.cat([batch for _, batch in batches]).tolist() for _ in range(3)]

        first = epochs(0)
        assert len({tuple(order) for order in first}) == 3
        assert epochs(0) == first
        assert epochs(1) != first

    def test_without_shuffle_epochs_are_the_same(self) -> None:
        images = tensor_pixels(5)
        batches = Batches(images, torch.arange(5), batch_size=2)
        assert torch.equal(torch.cat([x for x, _ in batches]), to_float(images))
        assert torch.equal(torch.cat([x for x, _ in batches]), to_float(images))

    @pytest.mark.parametrize("flip", [False, True])
    def test_augments_as_the_function_does(self, flip: bool) -> None:
        images = tensor_pixels(10, 6, 8)
        batches = Batches(
            images, torch.arange(10), batch_size=4, shuffle=True, augment=True, flip=flip, pad=3, generator=seeded(5)
        )
        generator = seeded(5)
        for _ in range(2):
            order = torch.randperm(10, generator=generator)
            for number, (x, labels) in enumerate(batches):
                chosen = order[4 * number : 4 * number + 4]
                assert torch.equal(labels, chosen)
                assert torch.equal(x, to_float(cropped_slowly(images[chosen], 3, flip, generator)))
                assert x.is_contiguous(memory_format=torch.channels_last)
                assert x.dtype == torch.float32

    def test_moves_drawn_on_the_device_have_the_same_distribution(self) -> None:
        window, sizes = Window(8, 8, 4, True), [100] * 90
        cpu, device = (draw_epoch(sizes, window, seeded(), torch.device("cpu"), draws) for draws in ("cpu", "device"))
        assert not torch.equal(cpu[0].top, device[0].top)
        for moves in (cpu, device):
            assert [len(move.top) for move in moves] == sizes
            for name, high in (("top", 9), ("left", 9), ("mirrored", 2)):
                counts = torch.cat([getattr(move, name) for move in moves]).flatten().long().bincount(minlength=high)
                assert float(((counts - 9000 / high) ** 2 / (9000 / high)).sum()) < 27  # chi-squared: 7e-4 for 8

    def test_epochs_drawn_on_the_device_repeat_and_go_on_in_the_middle(self) -> None:
        def batches() -> Batches:
            return Batches(
                tensor_pixels(10), torch.arange(10), batch_size=4, shuffle=True, augment=True, generator=seeded(),
                draws="device",
            )  # fmt: skip

        first, again, later = batches(), batches(), batches()
        whole = [x for _ in range(2) for x, _ in first]
        assert all(torch.equal(a, b) for a, b in zip(whole[:3], [x for x, _ in again], strict=True))
        list(later)
        later.pass_over(1)
        assert all(torch.equal(a, b) for a, b in zip(whole[4:], [x for x, _ in later], strict=True))

    def test_augmenting_alone_keeps_the_order(self) -> None:
        batches = Batches(tensor_pixels(5), torch.arange(5), batch_size=2, augment=True, generator=seeded())
        first, second = list(batches), list(batches)
        assert [y.tolist() for _, y in first] == [y.tolist() for _, y in second] == [[0, 1], [2, 3], [4]]
        assert not torch.equal(first[0][0], second[0][0])

    def test_global_state_and_arrays_are_left_alone(self) -> None:
        images = tensor_pixels(6)
        before, state = images.clone(), torch.random.get_rng_state()
        for x, _ in Batches(images, torch.arange(6), batch_size=3, shuffle=True, augment=True, generator=seeded()):
            x.zero_()
        for x, y in Batches(images, torch.arange(6), batch_size=6):
            x.zero_()
            y.zero_()
        assert torch.equal(images, before)
        assert torch.equal(torch.random.get_rng_state(), state)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"shuffle": True}, ValueError, r"generator: got None, .* shuffle=True, augment=False; pass torch"),
            ({"augment": True}, ValueError, r"generator: got None, .* shuffle=False, augment=True; pass torch"),
            ({"batch_size": 0}, ValueError, "batch_size: got 0, expected an integer, at least 1"),
            ({"batch_size": 2.5}, TypeError, r"batch_size: got 2\.5, expected an integer, at least 1"),
            ({"pad": -1}, ValueError, "pad: got -1, expected an integer, at least 0"),
            ({"batch_size": 6, "drop_last": True}, ValueError, "got 5 samples, which make no batch of batch_size=6"),
            ({"images": torch.zeros(5, 4, 4, 3)}, TypeError, r"images: got dtype torch\.float32"),
            ({"labels": torch.arange(4)}, ValueError, r"labels: got shape \(4,\), expected \(5,\)"),
            ({"labels": torch.arange(5).float()}, TypeError, r"labels: got dtype torch\.float32"),
            ({"images": tensor_pixels(0), "labels": torch.arange(0)}, ValueError, "got 0 samples, which make no batch"),
        ],
    )
    def test_arguments_are_checked(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        arguments: dict[str, Any] = {"images": tensor_pixels(5), "labels": torch.arange(5), "batch_size": 2} | changes
        with pytest.raises(error, match=message):
            Batches(arguments.pop("images"), arguments.pop("labels"), **arguments)


class TestStream:
    def test_a_data_set_of_the_size_of_imagenet_is_read_batch_by_batch(self) -> None:
        read: list[int] = []

        class Large(Dataset[tuple[Tensor, int]]):
            def __len__(self) -> int:
                return 1_281_167

            def __getitem__(self, index: int) -> tuple[Tensor, int]:
                read.append(index)
                return torch.full((3, 8, 8), 0.5), index % 1000

        source = Large()
        batches = iter(Stream(source, batch_size=256, pad=1, flip=True, generator=seeded(0)))
        for number in (1, 2):
            images, labels = next(batches)
            assert images.shape == (256, 3, 8, 8)
            assert len(read) == 256 * number
        assert labels.tolist() == [index % 1000 for index in read[256:]]
        assert len(set(read)) == 512
