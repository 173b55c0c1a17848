"""Networks to inspect, with their data: of runs, of the package, and your own by the name of a function."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odeadv import data
from odeadv.data import ImageDataset
from odeadv.experiments._config import DataConfig
from odeadv.experiments._folder import load_model
from odeadv.models import pretrained, pretrained_names, pretrained_record
from odeadv.support import plain
from odeadv.support.extras import extra


@dataclass(frozen=True)
class Inspected:
    """A network to inspect, with its data.

    Attributes:
        net: the network, on the device on which it is inspected.
        data: the data set of the network, with the requested number of test images.
        title: name of the network for a page.
    """

    net: nn.Module
    data: ImageDataset
    title: str


def inspected(
    network: str | Path, *, weights: Path | None, dataset: str | None, folder: Path | None, images: int | None
) -> Inspected:
    """Return a network with its data; the arguments mean the same as in `evaluate_run`."""
    if not is_import_name(network):
        if weights is not None or dataset is not None:
            raise ValueError(
                f"weights, dataset: got one for {network}, which has its own; give them with a network module:name only"
            )
        net, info = load_run(network)
        title = f"{run_folder(network).resolve().name}, weights of epoch {info['epoch']}"
        return Inspected(net, run_images(info, folder, images), title)
    if dataset is None:
        raise ValueError(f"dataset: missing for {network}, expected one of {', '.join(data.names())}")
    net, title = own_network(network, weights)
    return Inspected(net, data.load(dataset, folder).subset(None, images), title)


def is_import_name(network: str | Path) -> bool:
    """Return True for ``module:name``, and False for a path."""
    module, colon, name = str(network).partition(":")
    names = all(part.isidentifier() for part in (*module.split("."), *name.split(".")))
    return bool(colon) and names and not Path(network).exists()


def own_network(network: str | Path, weights: Path | None = None) -> tuple[nn.Module, str]:
    """Return your own network with its ``weights``, on its device; and its title."""
    net, title = _own(str(network)), str(network)
    if weights is not None:
        try:
            net.load_state_dict(_state(weights))
        except RuntimeError as error:  # torch lists every tensor that does not fit, one per line
            text = " ".join(str(error).split())
            why = text if len(text) <= 200 else f"{text[:197]}..."
            raise ValueError(f"weights: {weights} does not fit {network}: {why}") from None
        title += f" with {weights.name}"
    return net.eval().to(_device()), title


def run_folder(network: str | Path) -> Path:
    """Return the folder of a run. ``network`` is this folder, a file of weights in it, or a name of `pretrained`."""
    path = Path(network)
    return path if path.is_dir() or str(network) in pretrained_names() else path.parent


def load_run(network: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load the network of a run, or of `pretrained`, and its metadata; move it to the device for inspection.

    Args:
        network: the folder of a run, a file of weights in it, or one of `pretrained_names`.

    Returns:
        The network, and a dict with ``"run"`` and ``"epoch"`` as `load_model` returns it.

    Raises:
        FileNotFoundError, ValueError: see `load_model`.
    """
    if str(network) in pretrained_names():
        if any((Path(network) / f"{kind}.safetensors").exists() for kind in ("last", "best")):
            raise ValueError(
                f"network: {network} is a network of the package and a folder here; write ./{network} for it"
            )
        run = pretrained_record(str(network))["run"]
        return pretrained(str(network)).to(_device()), {"run": run, "epoch": run["training"]["epochs"]}
    if is_import_name(network):
        raise ValueError(
            f"network: got {network}, expected a run or a network of the package, whose eta and data are known; from "
            "Python, odeadv.diagnostics.diagnose(net.field(images, labels, eta), folder) takes any network"
        )
    if not Path(network).exists():
        raise FileNotFoundError(
            f"network: {network} does not exist, expected the folder of a run, its last.safetensors or "
            f"best.safetensors, module:name, or one of {', '.join(pretrained_names())}"
        )
    net, info = load_model(network)
    return net.to(_device()), info


def run_images(info: dict[str, Any], folder: Path | None, images: int | None) -> ImageDataset:
    """Return the data of a run (its fold or subset) with some of its test images.

    Args:
        info: the dict that `load_model` returns.
        folder: folder with the data sets.
        images: number of test images, balanced over the classes; all if None.
    """
    config = plain.from_dict(DataConfig, info["run"]["data"])
    subset, _ = config.take(data.load(config.name, folder))
    return subset.subset(None, images)


def check_images(
    argument: str, network: str | Path, info: dict[str, Any], data: ImageDataset, folder: Path | None
) -> None:
    """Raise ValueError if a network was trained on other images than ``data``, or on another size.

    Args:
        argument: name of the argument ``network``, for the message.
        network: the network's name.
        info: the dict that `load_run` returns.
        data: the images on which it will be used.
        folder: folder with the data sets.
    """
    got, expected = (
        f"{images.name} of {' x '.join(map(str, images.test_images.shape[1:3]))} pixels"
        for images in (run_images(info, folder, None), data)
    )
    if got != expected:
        raise ValueError(f"{argument}: got {network}, trained on {got}, expected one for {expected}")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _own(network: str) -> nn.Module:
    module, _, name = network.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"network: {module} cannot be imported ({error}), expected module:name") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"network: {module} lacks {name}, expected a network or a function that returns one")
        found = getattr(found, part)
    made = found if isinstance(found, nn.Module) or not callable(found) else found()
    if not isinstance(made, nn.Module):
        what = "is" if made is found else "returned"
        raise TypeError(f"network: {network} {what} {type(made).__name__}, expected a torch.nn.Module")
    return made


def _state(file: Path) -> dict[str, Tensor]:
    """Return the state dict in a file; remove the prefix ``module.`` that data-parallel training adds to names."""
    if not file.is_file():
        raise FileNotFoundError(f"weights: {file} is not a file, expected a state dict")
    state: Any  # the file may hold any object
    try:
        if file.suffix == ".safetensors":
            with extra("train"):
                from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # a damaged file may raise any error
        raise ValueError(
            f"weights: {file} cannot be read as a file of tensors ({type(error).__name__}), expected what "
            "torch.save(net.state_dict(), file) or safetensors wrote"
        ) from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights: {file} does not hold a state dict, expected what net.state_dict() returns")
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    return {name.removeprefix(prefix): value for name, value in state.items()}
