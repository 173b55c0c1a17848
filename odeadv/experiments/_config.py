"""The configuration of a training run as plain data. The result of a run depends only on its configuration."""

from __future__ import annotations

import difflib
import os
import re
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
    PerturbationKind,
    Pgd,
    Trades,
    TrainConfig,
    Undefended,
)


@dataclass(frozen=True)
class DataConfig:
    """The images of a run: training, test and validation images.

    Attributes:
        name: name of the data set, one of `odeadv.data.names`.
        train_images, test_images: numbers of images, balanced over the classes; None for all.
        validation_images: number of training images that are set aside to choose the best epoch (or eta).
            ``train_images`` are taken from the rest.
        folds: number of parts for cross-validation; 0 for no cross-validation. With folds, the training images are
            divided into parts, and part ``fold`` is the test set. The data set's own test images are not used.
        fold: index of the part that is the test set.
        image_size: height and width to which all images are averaged down; None keeps the original size.

    Raises:
        ValueError: if an attribute is out of range. The message names the attribute.
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

    @property
    def label(self) -> str:
        """The data set on the pages, such as "CIFAR-10"."""
        return re.sub("^cifar", "CIFAR-", self.name)

    def take(self, data: ImageDataset) -> tuple[ImageDataset, tuple[torch.Tensor, torch.Tensor] | None]:
        """Return the subset of ``data`` for training and testing, and the validation images (None if there are none).

        Raises:
            ValueError: if ``data`` has too few images.
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
    """The network of a run. The data set gives the number of classes and the normalisation.

    Attributes:
        name: one of `odeadv.models.names`.
        depth: depth of a ``"preact_resnet"``; other models ignore it.
        width: width of the network.
        damping: damping of the residual blocks: None, ``"damp"`` (In-ResNet) or ``"lambda-damp"``.
        noise: standard deviation of the training noise after every residual sum; 0 for no noise.
        noise_kind: ``"absolute"``, or ``"relative"`` to the standard deviation of the activation.
        passes: number of noisy passes that are averaged at inference, if the network has noise.
        options: further arguments of the model.
    """

    name: str = "preact_resnet"
    depth: int = 56
    width: int = 16
    damping: Literal["damp", "lambda-damp"] | None = None
    noise: float = 0.0
    noise_kind: Literal["absolute", "relative"] = "absolute"
    passes: int = 100
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The network on the pages, such as "ResNet-14 of width 8"."""
        names = {"preact_resnet": f"ResNet-{self.depth}", "residual_mlp": "residual MLP"}
        return f"{names.get(self.name, self.name)} of width {self.width}"

    def build(self, data: ImageDataset, generator: torch.Generator | None = None) -> FieldNetwork:
        """Build the network for the images of ``data``.

        Args:
            data: the data set: number of classes, mean and standard deviation of its pixels.
            generator: source of the initial weights; by default the global random state.

        Raises:
            TypeError, ValueError: if the model is unknown or does not take an argument.
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
    """The configuration of one training run.

    The evaluation is not part of it, so several tables can share one run.

    Attributes:
        data: the images.
        model: the network.
        training: the training method and its parameters.
        init: digest of the weights that the training starts from (`odeadv.training.weights_digest`); empty for the
            weights that the seed draws. `odeadv.experiments.run` sets it from its argument ``init``.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    init: str = ""

    @property
    def key(self) -> str:
        """A hash of all values that differ from the defaults. Equal configurations have equal keys."""
        return configuration.key(self)

    @property
    def method(self) -> str:
        """The name of the method, such as ``"pgd+lad-sm+noise"``; see `odeadv.experiments.method_of`."""
        return method_of(self)

    @property
    def name(self) -> str:
        """The name of the run's folder: data set, method, seed and the first 8 digits of the key."""
        method = self.method.replace("+", "-")
        return f"{self.data.name}-{method}-seed{self.training.seed}-{self.key[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain data."""
        plain: dict[str, Any] = configuration.to_dict(self)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, imports: bool = True) -> RunConfig:
        """Build a configuration from plain data; see `odeadv.experiments.load_config` for files.

        Args:
            data: the plain data.
            imports: as for `odeadv.experiments.load_config`.

        Raises:
            TypeError, ValueError: if a key is unknown, or its value has a wrong type or is out of range. The message
                names the key.
        """
        return configuration.from_dict(cls, data, imports=imports)


def load_config(file: str | os.PathLike[str], *, imports: bool = True) -> RunConfig:
    """Read the configuration of a run from a .json, .yaml or .yml file.

    Args:
        file: the file.
        imports: False imports no module that the file names. An objective or defence ``"module:Class"`` is then a
            stand-in that has a name only: enough to list the run, not to train it.

    Raises:
        TypeError, ValueError: if a key is unknown, or its value has a wrong type or is out of range. The message names
            the key.
        OSError: if the file cannot be read.
    """
    return configuration.read(RunConfig, Path(file), imports=imports)


OBJECTIVES = ("natural", "pgd", "trades")
DAMPINGS: tuple[Literal["damp", "lambda-damp"], ...] = ("damp", "lambda-damp")
DEFENCES = {"lad": "lie", "lad-sm": "strang", "lad-midpoint": "strang-midpoint", "lad-symmetric": "strang-symmetric"}
PERTURBATIONS = ("random", "shuffled", "input")


@dataclass(frozen=True)
class Method:
    """The parts of a training method; `parse_method` makes them from its name.

    Attributes:
        objective: ``"natural"``, ``"pgd"`` or ``"trades"``.
        scheme: splitting scheme of the layerwise defence; None for no scheme.
        perturbation: the perturbation of the state; see `Layerwise`.
        damping: damping of the residual blocks; None for no damping.
        noise: True for noise in training.
        zero: True for eta = 0.
        sweeps: number of recordings per step.
        matched: True for a run without a defence that takes as many passes as a run with LAD.
        penalty: True for the explicit gradient penalty instead of a layerwise defence.
    """

    objective: str
    scheme: str | None = None
    perturbation: PerturbationKind = "costate"
    damping: Literal["damp", "lambda-damp"] | None = None
    noise: bool = False
    zero: bool = False
    sweeps: int = 1
    matched: bool = False
    penalty: bool = False

    @property
    def defended(self) -> bool:
        """True if the method has a scheme or the explicit penalty, so that eta matters."""
        return self.scheme is not None or self.penalty

    def defence(self, eta: float) -> Defence:
        """Return the defence with the factor ``eta`` of the costate."""
        if self.penalty:
            return Penalty(eta)
        if self.scheme is None:
            return Undefended()
        return Layerwise(self.scheme, eta=0.0 if self.zero else eta, sweeps=self.sweeps, perturbation=self.perturbation)

    def training_objective(
        self, steps: int, eps: float, alpha: float, trades_start: Literal["free", "clamped"] = "free"
    ) -> Objective:
        """Return the objective with its training attack.

        Args:
            steps: number of steps of the attack.
            eps: radius of the L-infinity ball, in pixel units of [0, 1].
            alpha: length of a step of the attack.
            trades_start: the attribute ``start`` of `Trades`.
        """
        if self.objective == "natural":
            return Natural()
        if self.objective == "pgd":
            return Pgd(eps=eps, alpha=alpha, steps=steps)
        return Trades(eps=eps, alpha=alpha, steps=steps, start=trades_start)


def parse_method(name: str) -> Method:
    """Return the method called ``name``: an objective, then parts, joined by "+".

    The parts are:

    - ``damp``, ``lambda-damp``: damping of the residual blocks.
    - ``lad``, ``lad-sm``, ``lad-midpoint``, ``lad-symmetric``: LAD with the scheme ``"lie"``, ``"strang"``,
      ``"strang-midpoint"`` or ``"strang-symmetric"``.
    - ``sweeps2``, ``sweeps3`` and so on: the number of recordings of LAD.
    - ``random``, ``shuffled``, ``input``: ablations of the perturbation; see `Layerwise`.
    - ``eta0``: an ablation with eta = 0. For TRADES only the mix of losses remains.
    - ``penalty``: the explicit gradient penalty instead of LAD.
    - ``noise``: noise in training.
    - ``matched``: no defence, but more epochs, so that the run takes as many passes as with LAD.

    Args:
        name: the parts joined by "+", such as ``"pgd+lad-sm"``.

    Raises:
        ValueError: if a part is unknown, two parts set the same attribute, or the parts contradict each other.
    """
    objective, *parts = name.split("+")
    if objective not in OBJECTIVES:
        hint = f"; did you mean {name.lower()!r}?" if objective.lower() in OBJECTIVES else ""
        raise ValueError(f"method: got {name!r}, expected one that begins with {', '.join(OBJECTIVES)}{hint}")
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
    """Return the name of the method of ``config``.

    Objectives, defences and schemes that `parse_method` does not know appear by their registered names.

    Args:
        config: configuration of a run.
    """
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
    """Count the passes of one training step.

    A forward pass, a backward pass to activations and a backward pass to weights count 1 each. A pass that trains the
    weights therefore counts 3. An attack step or a recording counts 2. The exact midpoint adds 2. The explicit penalty
    also differentiates its recording, which adds 4: twice the recording.
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


assert set(get_args(PerturbationKind)) == {"costate", *PERTURBATIONS}
