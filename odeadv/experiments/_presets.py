"""The presets: the sizes at which the tables are run, and the configurations of the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from odeadv.experiments._config import DataConfig, ModelConfig, RunConfig, parse_method, passes
from odeadv.experiments._tables import LARGE, TABLES, Row, Table
from odeadv.support.checks import choice, integer
from odeadv.training import TrainConfig

NOISE_STD = 0.1  # the default of `odeadv.models.Noise`, stated because records keep it


@dataclass(frozen=True)
class Size:
    """The size of the runs of one objective.

    Attributes:
        depth, width: depth and width of the network. Only a ``"preact_resnet"`` uses the depth.
        epochs: one number, or one per data set. The learning rate is divided by 10 at 1/2 and 3/4 of the epochs.
        train_images, test_images: one number, or one per data set; see `DataConfig`.
        validation_images: as for `DataConfig`.
        precision: precision of training.
        eta: one value per data set, for batches of ``batch_size`` and the mean loss of a batch.
        attack_steps: number of steps of the training attack.
        passes: number of noisy passes that are averaged at inference.
        batch_size: images per step. If it changes, keep eta / batch_size constant.
        model: name of the network.
        options: further arguments of the network.
        image_size: as for `DataConfig`.
        augment, lr, weight_decay: as for `odeadv.training.TrainConfig`.
        eps_255: radius of the training attack in units of 1/255. The step size is a quarter of the radius.
        trades_start: the attribute ``start`` of `odeadv.training.Trades`.
    """

    depth: int
    width: int
    epochs: int | Mapping[str, int]
    precision: Literal["fp32", "bf16"]
    eta: Mapping[str, float]
    train_images: int | Mapping[str, int] | None = None
    test_images: int | Mapping[str, int | None] | None = None
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
        """Return True if the network supports ``row``.

        A ResNet-8 lacks a block to damp. Only ``"preact_resnet"`` takes damping or noise.
        """
        method = parse_method(row.method)
        if self.model != "preact_resnet":
            return method.damping is None and not method.noise
        return method.damping is None or self.depth >= 14

    def epochs_on(self, dataset: str) -> int:
        """Return the number of epochs for ``dataset``."""
        return self.epochs if isinstance(self.epochs, int) else self.epochs[dataset]

    def images_on(self, dataset: str) -> tuple[int | None, int | None]:
        """Return the numbers of training and of test images for ``dataset``; None for all."""
        train, test = self.train_images, self.test_images
        return (
            train[dataset] if isinstance(train, Mapping) else train,
            test[dataset] if isinstance(test, Mapping) else test,
        )


@dataclass(frozen=True)
class Preset:
    """The size at which tables are run.

    Attributes:
        name: name of the preset.
        dataset: default data set.
        sizes: size of the runs per objective.
        seeds: default seeds.
        says: description of the preset in one line.
        confirms_from: first seed that pilots have not used. The hypotheses come from earlier seeds, so only this seed
            and later seeds can confirm them.
        tables: tables that this preset runs in a special form, by name and data set.
        limits: sentence that says what runs of this size cannot show.
    """

    name: str
    dataset: str
    sizes: Mapping[str, Size]
    seeds: tuple[int, ...]
    says: str
    confirms_from: int = 0
    tables: Mapping[str, Mapping[str, Table]] = field(default_factory=dict)
    limits: str = ""

    def table(self, name: str, dataset: str | None = None) -> Table:
        """Return the table called ``name`` as this preset runs it on ``dataset`` (the preset's if None).

        Raises:
            ValueError: if the table is unknown.
        """
        choice("table", name, TABLES)
        return self.tables.get(name, {}).get(dataset or self.dataset, TABLES[name])

    def eta(self, row: Row, dataset: str) -> float:
        """Return eta of a defended ``row`` on ``dataset``, for the batch size of this preset."""
        return row.factor * self.sizes[row.method.split("+")[0]].eta[dataset]


ETA = {"cifar10": 50.0, "cifar100": 1000.0, "digits": 50.0, "folder": 50.0}

_PAPER = Size(56, 16, {"cifar10": 160, "cifar100": 300, "digits": 160, "folder": 160}, "fp32", ETA)

# Pilots on seeds 100 to 102 chose this size. The network fits its few images, so natural training is easy to attack; at
# this eta s is 10 to 20 % in the middle of training. With a residual MLP and 300 images the effect was not clear.
_SMOKE = Size(
    8, 8, 30, "fp32", dict.fromkeys(ETA, 20.0),
    train_images=500, test_images={**dict.fromkeys(ETA, 1000), "digits": None}, attack_steps=5, passes=3,
    batch_size=50, image_size=8, augment="none", weight_decay=5e-4,
)  # fmt: skip

_FIRST = replace(
    TABLES["table1"], title="Table 1 in small: natural training", rows=tuple(
        Row(method) for method in ("natural", "natural+lad", "natural+lad-sm", "natural+lad-sm+random")
    ),
    primary=(
        ("natural+lad", "natural"), ("natural+lad-sm", "natural"), ("natural+lad-sm", "natural+lad-sm+random"),
        ("natural+lad-sm+random", "natural"),
    ),
)  # fmt: skip

# Digits are black and white, so the radii of Table 1 do not change decisions. Digits get the radii of Table 2.
_FIRST_ON_DIGITS = replace(_FIRST, protocol="table2", columns=LARGE, autoattack_255=8.0)

_BF16 = Size(8, 16, 8, "bf16", ETA)

# `odeadv tune` chose eta on CIFAR-10: docs/results/tune/pgd-cifar10-bf16.json.
_BF16_ADVERSARIAL = Size(
    8, 16, 40, "bf16", {**ETA, "cifar10": 1600.0},
    train_images=2000, test_images=2000, validation_images=500, attack_steps=7,
    passes=10,
)  # fmt: skip

# Few images and many epochs. The paper's networks fit their training images; `cpu` is closer to this than `bf16`.
_CPU = Size(
    14, 8, 40, "fp32", {name: eta / 2 for name, eta in ETA.items()},
    train_images=5000, test_images=2000, validation_images=200, passes=10, batch_size=64,
)  # fmt: skip

# `odeadv tune` chose eta on CIFAR-10: docs/results/tune/pgd-cifar10-cpu.json. On CIFAR-100 eta is 1000 * 7e5 / 1e5:
# 1000 is the paper's eta, 7e5 is the ratio of Eq. 16 at which plain PGD settles here, and 1e5 is the paper's smallest.
_CPU_ADVERSARIAL = replace(
    _CPU, eta={**_CPU.eta, "cifar10": 50.0, "cifar100": 7000.0}, attack_steps=7,
    trades_start="clamped",  # the committed runs used this start
    # CIFAR-100 has ten times as many classes. It gets twice the images and fewer epochs, at about the same cost.
    epochs={**dict.fromkeys(ETA, 45), "cifar100": 30}, train_images={**dict.fromkeys(ETA, 1000), "cifar100": 2000},
)  # fmt: skip

# In these regimes plain PGD over-fits, so a defence can improve it: few small images, no augmentation, a radius of
# 4/255. The pilots chose eta (docs/results/rules.md). Their seeds are not used again.
_MLP = Size(
    ModelConfig.depth, 128, 60, "fp32", dict.fromkeys(ETA, 25.0),
    train_images=1000, test_images=4000, validation_images=2000, attack_steps=5, batch_size=64,
    model="residual_mlp", options={"blocks": 6, "image_size": 8}, image_size=8,
    augment="none", lr=0.05, weight_decay=5e-4, eps_255=4.0,
)  # fmt: skip

_OVERFIT = replace(_MLP, depth=8, width=16, model="preact_resnet", options={}, lr=0.1, passes=10)

#: The sizes at which tables run, by name: one `Preset` each.
PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "smoke", "digits", {"natural": _SMOKE, "pgd": _SMOKE, "trades": _SMOKE}, (0, 1, 2, 3, 4),
            "shows the effect in about two minutes: ResNet-8 of width 8 on 500 images of 8 x 8 pixels, five seeds; "
            "Table 1 without damping and with random directions",
            tables={"table1": {**dict.fromkeys(ETA, _FIRST), "digits": _FIRST_ON_DIGITS}},
            limits="This run says nothing about larger networks or all images. Its network over-fits a few hundred "
            "small images, and the setting was chosen because the effect of Table 1 shows in it: network, epochs and "
            "eta come from pilots on other seeds but on the same test images.",
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
            "real CIFAR at 8 x 8 pixels, a ResNet-8 that over-fits 1000 images, eight seeds; two minutes per run "
            "on one core",
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
    """Return the configuration of the run of ``row`` at ``size`` on ``dataset``.

    Args:
        row: a row of a table; its method and its changes decide what is trained.
        size: size of the run: network, number of images, epochs, eta.
        dataset: name of the data set, a key of ``size.eta``.
        seed: seed of the run, for initial weights and training.

    Raises:
        ValueError: if ``size`` lacks an eta for ``dataset``, or the method of ``row`` is unknown.
    """
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
        data=DataConfig(dataset, *size.images_on(dataset), size.validation_images, image_size=size.image_size),
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
            objective=method.training_objective(
                size.attack_steps, size.eps_255 / 255, size.eps_255 / 4 / 255, size.trades_start
            ),
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
    """Return ``preset`` with another eta, such as a tuned one, for the objectives of ``table`` on ``dataset``.

    Args:
        preset: the preset to change; it stays as it is.
        table: only objectives of its rows get the new eta.
        dataset: only this data set gets the new eta.
        eta: factor of the costate for a loss averaged over the batch, see `Layerwise`.
    """
    objectives = {row.method.split("+")[0] for row in table.rows}
    sizes = {
        name: replace(size, eta={**size.eta, dataset: float(eta)}) if name in objectives else size
        for name, size in preset.sizes.items()
    }
    return replace(preset, sizes=sizes)


def with_images(preset: Preset, train: int, test: int | None = None) -> Preset:
    """Return ``preset`` with another number of training images, and of test images if ``test`` is given.

    Args:
        preset: the preset to change; it stays as it is.
        train: number of training images.
        test: number of test images; None keeps the number of the preset.

    Raises:
        ValueError, TypeError: if a number is not a positive integer.
    """
    changes: dict[str, Any] = {"train_images": integer("images", train, least=1)}
    if test is not None:
        changes["test_images"] = integer("images", test, least=1)
    return replace(preset, sizes={name: replace(size, **changes) for name, size in preset.sizes.items()})


def configurations(
    table: Table,
    preset: Preset,
    *,
    dataset: str | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[tuple[Row, RunConfig]]:
    """Return the runs of ``table`` at ``preset``: all rows of the first seed, then all rows of the next seed.

    Rows that the network does not support (see `Size.can_run`) are left out unless ``methods`` names them.

    Args:
        table: the table that gives the rows.
        preset: the preset that gives the sizes.
        dataset: data set; None for the preset's.
        methods: names of some rows; None for all rows.
        seeds: seeds; None for the preset's.

    Raises:
        ValueError: if a method is not a row of the table, or the preset lacks an eta for the data set.
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
