"""Everything the result of a training depends on, as plain data."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from odeadv import models
from odeadv.data import ImageDataset
from odeadv.models import FieldNetwork
from odeadv.splitting import schemes
from odeadv.support import plain as configuration
from odeadv.support.checks import integer
from odeadv.training import (
    Defence,
    Layerwise,
    Natural,
    Objective,
    Penalty,
    Perturbation,
    Pgd,
    Trades,
    TrainConfig,
    Undefended,
)


@dataclass(frozen=True)
class DataConfig:
    """What is trained and tested on.

    Attributes:
        name: of the data set, one of `odeadv.data.names`.
        train_images, test_images: how many of them, balanced over the classes; None for all.
        validation_images: how many of all training images are set aside to choose the best epoch (or eta) by;
            ``train_images`` are taken from the others.
        folds: for cross-validation, into how many parts the training images are divided (0: they are not); the test
            images are then part ``fold`` of them, and those of the data set are not used.
        fold: which part.
        image_size: height and width that all images are averaged down to; None keeps them as they are.

    Raises:
        ValueError: naming the attribute that is out of range.
    """

    name: str = "cifar10"
    train_images: int | None = None
    test_images: int | None = None
    validation_images: int = 0
    folds: int = 0
    fold: int = 0
    image_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("train_images", "test_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1, or null for all")
        if self.image_size is not None:
            integer("image_size", self.image_size, least=1)
        if self.validation_images < 0:
            raise ValueError(f"validation_images: got {self.validation_images}, expected at least 0")
        if self.folds < 0 or self.folds == 1 or not 0 <= self.fold <= max(0, self.folds - 1):
            raise ValueError(f"folds, fold: got {self.folds} and {self.fold}, expected at least 2, and fold below it")

    def take(self, data: ImageDataset) -> tuple[ImageDataset, tuple[torch.Tensor, torch.Tensor] | None]:
        """Return the subset of the whole ``data`` to train and test on, and the images set aside.

        Raises:
            ValueError: if there are too few images.
        """
        aside = None
        if self.image_size is not None:
            data = data.resized(self.image_size)
        if self.folds:
            data = data.fold(self.fold, self.folds)
        if self.validation_images:
            data, aside = data.without_validation(self.validation_images)
        return data.subset(self.train_images, self.test_images), aside


@dataclass(frozen=True)
class ModelConfig:
    """Which network; the numbers of classes and the normalisation are the data set's.

    Attributes:
        name: one of `odeadv.models.names`.
        depth, width: of a ``"preact_resnet"``; width alone of others.
        damping: None, ``"damp"`` (In-ResNet) or ``"lambda-damp"``.
        noise: standard deviation of the noise after every residual sum in training, 0 for none.
        noise_kind: ``"absolute"``, or ``"relative"`` to the activation's own standard deviation.
        passes: noisy passes averaged at inference, for a network with noise.
        options: further arguments of that model.
    """

    name: str = "preact_resnet"
    depth: int = 56
    width: int = 16
    damping: Literal["damp", "lambda-damp"] | None = None
    noise: float = 0.0
    noise_kind: Literal["absolute", "relative"] = "absolute"
    passes: int = 100
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, data: ImageDataset, generator: torch.Generator | None = None) -> FieldNetwork:
        """Build the network for the images of ``data``.

        Raises:
            TypeError, ValueError: for an unknown model or arguments it does not take.
        """
        common = {"width": self.width, "num_classes": data.num_classes, "mean": data.mean, "std": data.std}
        if self.name == "preact_resnet":
            common |= {"depth": self.depth, "damping": self.damping}
            common |= {"noise": self.noise, "noise_kind": self.noise_kind}
        elif self.damping or self.noise:
            raise ValueError(f"model: {self.name} takes no damping or noise, got {self.damping!r} and {self.noise}")
        return models.build(self.name, **common, **self.options, generator=generator)


@dataclass(frozen=True)
class RunConfig:
    """One training run; how it is evaluated is not part of it, so that tables can share it.

    Attributes:
        data: what it is trained on.
        model: what is trained.
        training: how.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainConfig = field(default_factory=TrainConfig)

    @property
    def key(self) -> str:
        """A hash of what differs from the defaults: equal for equal runs."""
        return configuration.key(self)

    @property
    def method(self) -> str:
        """The method in words, such as ``"pgd+lad-sm+noise"``; see `odeadv.experiments.method_of`."""
        return method_of(self)

    @property
    def name(self) -> str:
        """The name of its folder: data, method, seed, and enough of the key to be one run's alone."""
        method = self.method.replace("+", "-")
        return f"{self.data.name}-{method}-seed{self.training.seed}-{self.key[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        plain: dict[str, Any] = configuration.to_dict(self)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunConfig:
        """From plain data; see `odeadv.experiments.load_config` for files.

        Raises:
            TypeError, ValueError: naming the key that is unknown, of a wrong type or out of range.
        """
        return configuration.from_dict(cls, data)


def load_config(file: str | os.PathLike[str]) -> RunConfig:
    """Read the configuration of a run from a .json, .yaml or .yml file.

    Raises:
        TypeError, ValueError: naming the key that is unknown, of a wrong type or out of range.
        OSError: if the file cannot be read.
    """
    return configuration.load(RunConfig, Path(file))


OBJECTIVES = ("natural", "pgd", "trades")
DAMPINGS: tuple[Literal["damp", "lambda-damp"], ...] = ("damp", "lambda-damp")
DEFENCES = {"lad": "lie", "lad-sm": "strang", "lad-midpoint": "strang-midpoint", "lad-symmetric": "strang-symmetric"}
PERTURBATIONS = ("random", "shuffled", "input")


@dataclass(frozen=True)
class Method:
    """A method, taken apart.

    Attributes:
        objective: ``"natural"``, ``"pgd"`` or ``"trades"``.
        scheme: of the defence; None for none.
        perturbation: what drives the state.
        damping: of the residual blocks.
        noise: whether there is noise in training.
        zero: eta = 0.
        sweeps: recordings.
        matched: without a defence, trained for as many passes as with LAD.
        penalty: the explicit gradient penalty takes the place of a defence by a scheme.
    """

    objective: str
    scheme: str | None = None
    perturbation: Perturbation = "costate"
    damping: Literal["damp", "lambda-damp"] | None = None
    noise: bool = False
    zero: bool = False
    sweeps: int = 1
    matched: bool = False
    penalty: bool = False

    @property
    def defended(self) -> bool:
        """True if eta matters: there is a scheme or the explicit penalty."""
        return self.scheme is not None or self.penalty

    def defence(self, eta: float) -> Defence:
        """Return the defence with strength ``eta``."""
        if self.penalty:
            return Penalty(eta)
        if self.scheme is None:
            return Undefended()
        return Layerwise(self.scheme, 0.0 if self.zero else eta, self.sweeps, None, self.perturbation)

    def attack(
        self, steps: int, eps: float, alpha: float, trades_start: Literal["free", "clamped"] = "free"
    ) -> Objective:
        """Return the objective, with the attack that is trained on; for ``trades_start`` see `Trades`."""
        if self.objective == "natural":
            return Natural()
        if self.objective == "pgd":
            return Pgd(eps=eps, alpha=alpha, steps=steps)
        return Trades(eps=eps, alpha=alpha, steps=steps, start=trades_start)


def parse_method(name: str) -> Method:
    """Return the method called ``name``: an objective, then parts joined by "+".

    Parts: ``damp``, ``lambda-damp``; ``lad``, ``lad-sm``, ``lad-midpoint``, ``lad-symmetric`` (schemes ``"lie"``,
    ``"strang"``, ``"strang-midpoint"``, ``"strang-symmetric"``), with ``sweeps2`` and the like; for ablations
    ``random``, ``shuffled``, ``input`` (what drives the state) and ``eta0`` (eta = 0; for TRADES the mix of losses is
    what is left); ``penalty``, the explicit gradient penalty in place of LAD; ``noise``; and ``matched``, without a
    defence, for more epochs: as many passes as with LAD.

    Raises:
        ValueError: for a part that is none of these, or two of a kind.
    """
    objective, *parts = name.split("+")
    if objective not in OBJECTIVES:
        raise ValueError(f"method: got {name!r}, expected one that begins with {', '.join(OBJECTIVES)}")
    found: dict[str, object] = {}
    for part in parts:
        kind, value = _part(name, part)
        if kind in found:
            raise ValueError(f"method: {name!r} has two parts that set its {kind}")
        found[kind] = value
    if "scheme" not in found and found.keys() & {"perturbation", "zero", "sweeps"}:
        raise ValueError(f"method: {name!r} changes a defence it does not have; add +lad or +lad-sm")
    if "scheme" in found and "penalty" in found:
        raise ValueError(f"method: {name!r} has LAD and its explicit penalty; give one of them")
    if found.keys() & {"scheme", "penalty"} and "matched" in found:
        raise ValueError(f"method: {name!r} has a defence, whose passes it cannot be matched to")
    return Method(objective, **found)  # type: ignore[arg-type]


def _part(name: str, part: str) -> tuple[str, object]:
    if part in DAMPINGS:
        return "damping", part
    if part in DEFENCES:
        return "scheme", DEFENCES[part]
    if part in PERTURBATIONS:
        return "perturbation", part
    if part in ("matched", "penalty"):
        return part, True
    if part == "noise":
        return "noise", True
    if part == "eta0":
        return "zero", True
    if part.startswith("sweeps") and part[6:].isdigit() and int(part[6:]) >= 1:
        return "sweeps", int(part[6:])
    known = [*DAMPINGS, *DEFENCES, *PERTURBATIONS, "noise", "eta0", "sweeps2", "penalty", "matched"]
    near = "".join(f"; did you mean {match!r}?" for match in difflib.get_close_matches(part, known, n=1))
    raise ValueError(f"method: {part!r} in {name!r} is not known{near}; parts are {', '.join(known)}")


def method_of(config: RunConfig) -> str:
    """Return the name of the method that ``config`` runs; your own objectives, defences and schemes by their names."""
    model, training = config.model, config.training
    name = type(training.objective).name
    if model.damping:
        name += f"+{model.damping}"
    defence = training.defence
    if isinstance(defence, Layerwise):
        canonical = schemes.get(defence.scheme).name
        names = {schemes.get(scheme).name: part for part, scheme in DEFENCES.items()}
        name += f"+{names.get(canonical, canonical)}"
        if defence.sweeps != 1:
            name += f"+sweeps{defence.sweeps}"
        if defence.ascent is not None:
            name += f"+ascent{defence.ascent}"
        if defence.perturbation != "costate":
            name += f"+{defence.perturbation}"
        if defence.eta == 0:
            name += "+eta0"
    elif defence.active:
        name += f"+{type(defence).name}"
    if model.noise:
        name += "+noise"
    return name


def passes(config: RunConfig) -> int:
    """Count the passes of a training step: forward, to activations and to weight gradients count 1 each.

    A pass that is trained on counts 3, an attack step or a recording 2; the exact midpoint 2 more. Differentiating a
    recording, as the explicit penalty does, counts twice what the recording does.
    """
    training = config.training
    objective = training.objective
    attack = 2 * getattr(objective, "steps", 0)
    trained = 3 + attack
    if isinstance(objective, Trades):
        trained = 1 + attack + 6 + (3 if training.defence.active else 0)
    defence = training.defence
    if isinstance(defence, Layerwise) and defence.eta:
        recordings = defence.ascent or (defence.sweeps if isinstance(defence.sweeps, int) else 1)
        trained += 2 * recordings + (2 if schemes.get(defence.scheme).name == "strang-midpoint" else 0)
    if isinstance(defence, Penalty) and defence.eta:
        trained += 2 + 4
    return trained


assert set(get_args(Perturbation)) == {"costate", *PERTURBATIONS}
