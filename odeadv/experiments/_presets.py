"""The presets: at what size the tables are run, and the runs that this makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from odeadv.experiments._config import DataConfig, ModelConfig, RunConfig, parse_method, passes
from odeadv.experiments._tables import Row, Table
from odeadv.training import TrainConfig

NOISE_STD = 0.1


@dataclass(frozen=True)
class Size:
    """How large the runs of one kind of objective are.

    Attributes:
        depth, width: of the network.
        epochs: a number, or one for each data set; the learning rate is divided by 10 at 1/2 and 3/4 of them.
        train_images: a number, or one for each data set; see `DataConfig`.
        test_images, validation_images: see `DataConfig`.
        precision: of training.
        eta: one for each data set, for batches of ``batch_size`` and a loss averaged over them.
        attack_steps: of the attack trained on.
        passes: noisy passes averaged at inference.
        batch_size: images a step; eta / batch_size is what is invariant.
        model: name of the network; ``depth`` is that of a ``"preact_resnet"``.
        options: further arguments of that network.
        image_size: see `DataConfig`.
        augment, lr, weight_decay: see `odeadv.training.TrainConfig`.
        eps_255: radius of the attack trained on, in 1/255; its steps are a quarter of it.
        trades_start: see `odeadv.training.Trades`.
    """

    depth: int
    width: int
    epochs: int | Mapping[str, int]
    precision: Literal["fp32", "bf16"]
    eta: Mapping[str, float]
    train_images: int | Mapping[str, int] | None = None
    test_images: int | None = None
    validation_images: int = 0
    attack_steps: int = 10
    passes: int = 100
    batch_size: int = 128
    model: str = "preact_resnet"
    options: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    augment: Literal["crop-flip", "crop", "flip", "none"] = "crop-flip"
    lr: float = 0.1
    weight_decay: float = 1e-4
    eps_255: float = 8.0
    trades_start: Literal["free", "clamped"] = "free"

    def can_run(self, row: Row) -> bool:
        """Return whether the network has what ``row`` changes: a ResNet-8 lacks a block to damp, an MLP noise."""
        method = parse_method(row.method)
        if self.model != "preact_resnet":
            return method.damping is None and not method.noise
        return method.damping is None or self.depth >= 14

    def epochs_on(self, dataset: str) -> int:
        """Epochs for a data set."""
        return self.epochs if isinstance(self.epochs, int) else self.epochs[dataset]

    def train_images_on(self, dataset: str) -> int | None:
        """Training images of a data set."""
        return self.train_images[dataset] if isinstance(self.train_images, Mapping) else self.train_images


@dataclass(frozen=True)
class Preset:
    """At what size tables are run.

    Attributes:
        name: of the preset.
        dataset: the data set unless another is asked for.
        sizes: by objective.
        seeds: unless others are asked for.
        says: what it is, in a line.
        confirms_from: the first seed that no pilot has used: earlier ones made the hypotheses.
    """

    name: str
    dataset: str
    sizes: Mapping[str, Size]
    seeds: tuple[int, ...]
    says: str
    confirms_from: int = 0

    def eta(self, row: Row, dataset: str) -> float:
        """Eta of a defended ``row``, for batches of this preset's size."""
        return row.factor * self.sizes[row.method.split("+")[0]].eta[dataset]


ETA = {"cifar10": 50.0, "cifar100": 1000.0, "digits": 50.0, "folder": 50.0}

_PAPER = Size(56, 16, {"cifar10": 160, "cifar100": 300, "digits": 160, "folder": 160}, "fp32", ETA)

_SMOKE = Size(14, 8, 8, "fp32", ETA, passes=3)

_BF16 = Size(8, 16, 8, "bf16", ETA)

# Eta on CIFAR-10 was chosen by `odeadv tune`: docs/results/tune/pgd-cifar10-bf16.json.
_BF16_ADVERSARIAL = Size(
    8, 16, 40, "bf16", {**ETA, "cifar10": 1600.0},
    train_images=2000, test_images=2000, validation_images=500, attack_steps=7,
    passes=10,
)  # fmt: skip

# Few images and many epochs: nearer to the paper's networks, which fit what they are trained on, than `bf16` is.
_CPU = Size(
    14, 8, 40, "fp32", {name: eta / 2 for name, eta in ETA.items()},
    train_images=5000, test_images=2000, validation_images=200, passes=10, batch_size=64,
)  # fmt: skip

# Eta on CIFAR-10 was chosen by `odeadv tune`: docs/results/tune/pgd-cifar10-cpu.json. On CIFAR-100 it is the paper's
# 1000 times the Eq. 16 ratio that plain PGD settles at here, 7e5, over the least of the paper, 1e5.
_CPU_ADVERSARIAL = replace(
    _CPU, eta={**_CPU.eta, "cifar10": 50.0, "cifar100": 7000.0}, attack_steps=7,
    trades_start="clamped",  # as the committed runs have it
    # CIFAR-100 has ten times the classes: twice the images, at about the same price.
    epochs={**dict.fromkeys(ETA, 45), "cifar100": 30}, train_images={**dict.fromkeys(ETA, 1000), "cifar100": 2000},
)  # fmt: skip

# Regimes in which plain PGD over-fits, so that a defence has something to mend: few small images, no augmentation, a
# radius of 4/255. Eta is that of the pilots (docs/results/rules.md); the seeds of the pilots are not used again.
_MLP = Size(
    ModelConfig.depth, 128, 60, "fp32", dict.fromkeys(ETA, 25.0),
    train_images=1000, test_images=4000, validation_images=2000, attack_steps=5, batch_size=64,
    model="residual_mlp", options={"blocks": 6, "image_size": 8}, image_size=8,
    augment="none", lr=0.05, weight_decay=5e-4, eps_255=4.0,
)  # fmt: skip

_OVERFIT = replace(_MLP, depth=8, width=16, model="preact_resnet", options={}, image_size=16, lr=0.1)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "smoke", "digits", {"natural": _SMOKE, "pgd": _SMOKE, "trades": _SMOKE}, (0,),
            "shows that everything works: ResNet-14 of width 8, 8 epochs on small images, one seed; minutes",
        ),
        Preset(
            "cpu", "cifar10", {"natural": _CPU, "pgd": _CPU_ADVERSARIAL, "trades": _CPU_ADVERSARIAL}, (0, 1, 2),
            "real CIFAR on any two cores: ResNet-14 of width 8 on few images, three seeds; minutes a run",
            confirms_from=3,
        ),
        Preset(
            "bf16", "cifar10", {"natural": _BF16, "pgd": _BF16_ADVERSARIAL, "trades": _BF16_ADVERSARIAL}, (0, 1, 2),
            "real CIFAR on two cores that compute in bfloat16: ResNet-8 of width 16, three seeds; natural training on "
            "all images, adversarial on some",
            confirms_from=3,
        ),
        Preset(
            "mlp", "cifar10", {"natural": _MLP, "pgd": _MLP, "trades": _MLP}, tuple(range(10, 20)),
            "real CIFAR at 8 x 8 pixels, a residual MLP that over-fits 1000 images, ten seeds; less than a minute per "
            "run on one core",
            confirms_from=10,
        ),
        Preset(
            "overfit", "cifar10", {"natural": _OVERFIT, "pgd": _OVERFIT, "trades": _OVERFIT}, tuple(range(10, 18)),
            "real CIFAR at 16 x 16 pixels, a ResNet-8 that over-fits 1000 images, eight seeds; minutes a run",
            confirms_from=10,
        ),
        Preset(
            "paper", "cifar10", {"natural": _PAPER, "pgd": _PAPER, "trades": _PAPER}, (0, 1, 2),
            "Appendix B to the letter: ResNet-56, 160 epochs (300 for CIFAR-100), three seeds; for a GPU",
        ),
    )
}  # fmt: skip


def _passes(row: Row, size: Size, dataset: str) -> int:
    return passes(configuration(row, size, dataset, 0))


def configuration(row: Row, size: Size, dataset: str, seed: int) -> RunConfig:
    """Return the run of ``row`` at ``size``."""
    if dataset not in size.eta:
        raise ValueError(f"dataset: got {dataset!r}, expected one of {', '.join(size.eta)}")
    method = parse_method(row.method)
    epochs = size.epochs_on(dataset)
    if method.matched:
        epochs = round(
            epochs
            * _passes(Row(f"{method.objective}+lad"), size, dataset)
            / _passes(Row(method.objective), size, dataset)
        )
    return RunConfig(
        data=DataConfig(
            dataset, size.train_images_on(dataset), size.test_images, size.validation_images, image_size=size.image_size
        ),
        model=ModelConfig(
            name=size.model,
            depth=size.depth,
            width=size.width,
            damping=method.damping,
            noise=NOISE_STD if method.noise else 0.0,
            passes=size.passes if method.noise else ModelConfig.passes,
            options=size.options,
        ),
        training=TrainConfig(
            objective=method.attack(size.attack_steps, size.eps_255 / 255, size.eps_255 / 4 / 255, size.trades_start),
            defence=method.defence(row.factor * size.eta[dataset]),
            epochs=epochs,
            batch_size=size.batch_size,
            lr=size.lr,
            milestones=(epochs // 2, epochs * 3 // 4),
            weight_decay=size.weight_decay if row.weight_decay is None else row.weight_decay,
            augment=size.augment,
            precision=size.precision,
            seed=seed,
        ),
    )


def with_eta(preset: Preset, table: Table, dataset: str, eta: float) -> Preset:
    """``preset`` with another eta for the objectives of ``table`` on ``dataset``, such as one that was tuned."""
    objectives = {row.method.split("+")[0] for row in table.rows}
    sizes = {
        name: replace(size, eta={**size.eta, dataset: float(eta)}) if name in objectives else size
        for name, size in preset.sizes.items()
    }
    return replace(preset, sizes=sizes)


def configurations(
    table: Table,
    preset: Preset,
    *,
    dataset: str | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[tuple[Row, RunConfig]]:
    """Return the runs of ``table`` at ``preset``: all rows of the first seed, then of the next.

    Rows with damping are left out if the network lacks a block to damp, unless they are asked for.

    Args:
        table: rows and protocol.
        preset: size.
        dataset: instead of the preset's.
        methods: some of the rows, by name.
        seeds: instead of the preset's.

    Raises:
        ValueError: for a method that is not a row, or a data set without a value of eta.
    """
    rows = [table.row(name) for name in methods or table.methods]
    sizes = {row.name: preset.sizes[row.method.split("+")[0]] for row in rows}
    if not methods:
        rows = [row for row in rows if sizes[row.name].can_run(row)]
    return [
        (row, configuration(row, sizes[row.name], dataset or preset.dataset, seed))
        for seed in (preset.seeds if seeds is None else seeds)
        for row in rows
    ]
