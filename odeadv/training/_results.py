"""The results of a training: numbers of every epoch, the best weights, and plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from odeadv.support.extras import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class EpochResult:
    """The results of one epoch.

    Attributes:
        epoch: number of the epoch, counted from 1.
        loss: mean training loss; L_LAD if there is a defence.
        accuracy: training accuracy of the same forward passes, in [0, 1].
        lr: learning rate of the last step.
        seconds: wall time.
        ratio: Eq. 16, ||x(0) + f(x(0), 0)|| / ||dL/dx(0)||, on the last batch of the epoch; None if it is not finite.
            If the batch has several parts, the last part is used, and the ratio is scaled to the mean loss over the
            batch.
        relative: ||eta a_n|| / ||x_n|| at every node, on the same batch; a_n is the costate at the state x_n.
        validation: accuracies on the validation images: ``clean``, and ``robust`` for adversarial objectives (IFGSM-10
            at the eps of the objective, with alpha = eps / 4); None without validation images.
        strength: s = L_LAD / L - 1, the relative rise of the loss by the perturbation; None if the defence does not
            measure it. For `Penalty` it equals ``strength_first_order``.
        strength_first_order: the first-order part of ``strength``, eta sum |a_n|^2 / L.
        strength_nodes: the contribution of each node to ``strength_first_order``, x_0 first.
        eta: eta of the defence in the last step of the epoch, after its choice from a strength and after warm-up.
    """

    epoch: int
    loss: float
    accuracy: float
    lr: float
    seconds: float
    ratio: float | None = None
    relative: tuple[float, ...] = ()
    validation: dict[str, float] | None = None
    strength: float | None = None
    strength_first_order: float | None = None
    strength_nodes: tuple[float, ...] = ()
    eta: float = 0.0

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], file: object = "epoch") -> EpochResult:
        """Return the result that `dataclasses.asdict` converted to ``plain``.

        Args:
            plain: the fields; lists become tuples.
            file: name of the file that contained ``plain``, for the message.

        Raises:
            ValueError: if fields are missing or unknown; the message names the file and the fields.
        """
        fields = dataclasses.fields(cls)
        unknown = sorted(plain.keys() - {field.name for field in fields})
        missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in plain]
        if unknown or missing:
            said = [f"lacks {', '.join(missing)}"] if missing else []
            said += [f"has unknown {', '.join(unknown)}"] if unknown else []
            raise ValueError(f"{file}: {cls.__name__} {' and '.join(said)}; another version of odeadv wrote it")
        values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        return cls(**values)

    def scalars(self) -> dict[str, float]:
        """Return all numbers by name, for a logger: ``"loss"``, ``"validation/robust"``, ``"relative/0"``, ..."""
        return dict(_flat(dataclasses.asdict(self)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, tuple | list):
            yield from _flat(dict(zip(map(str, range(len(value))), value, strict=True)), f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


@dataclass(repr=False)
class TrainResult:
    """The results of a training.

    Attributes:
        epochs: one result per epoch.
        best_epoch: the first epoch with the highest validation accuracy (robust accuracy for adversarial objectives);
            None without validation images.
        best: parameters and buffers after the best epoch; their average if the configuration has ``ema``.
    """

    epochs: list[EpochResult] = field(default_factory=list)
    best_epoch: int | None = None
    best: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        if not self.epochs:
            return "TrainResult(no epochs)"
        last = self.epochs[-1]
        parts = [f"{len(self.epochs)} epochs", f"loss {last.loss:.4g}", f"accuracy {100 * last.accuracy:.1f} %"]
        parts += [f"{name} {100 * value:.1f} %" for name, value in (last.validation or {}).items()]
        parts += [] if not last.strength else [f"s {100 * last.strength:.2g} %"]
        parts += [] if self.best_epoch is None else [f"best epoch {self.best_epoch}"]
        return f"TrainResult({', '.join(parts)})"

    def plot(self) -> Figure:
        """Draw loss, clean and robust accuracy, the ratio of Eq. 16 and the strength s against the epochs.

        This needs the extra ``plot``.

        Returns:
            A matplotlib figure. A notebook shows it; ``figure.savefig("training.png")`` saves it.

        Raises:
            ValueError: if the result lacks epochs.
        """
        if not self.epochs:
            raise ValueError("epochs: got none, expected at least one to draw")
        figure, panels = _panels()
        clean, robust = self._validated("clean"), self._validated("robust")
        first_order = [epoch.strength_first_order for epoch in self.epochs]
        _draw(panels[0], {"": [epoch.loss for epoch in self.epochs]})
        accuracies: dict[str, list[float | None]] = {}
        accuracies |= {"training": [epoch.accuracy for epoch in self.epochs], "clean": clean, "robust": robust}
        _draw(panels[1], accuracies)
        _draw(panels[2], {"": [epoch.ratio for epoch in self.epochs]}, log=True)
        _draw(panels[3], {"L_LAD / L - 1": [epoch.strength for epoch in self.epochs], "first order": first_order})
        if self.best_epoch is not None:
            panels[1].axvline(self.best_epoch, color="0.6", lw=0.8)
        return figure

    def _validated(self, name: str) -> list[float | None]:
        """Return the validation accuracy called ``name`` after each epoch, None if it was not measured."""
        return [(epoch.validation or {}).get(name) for epoch in self.epochs]


def plot_curves(results: Mapping[str, TrainResult]) -> Figure:
    """Draw loss, accuracies, the ratio of Eq. 16 and the strength s of several trainings, one line per training.

    Accuracies are measured on the validation images, or on the training images if validation images are missing.
    Robust accuracies have a second line. This needs the extra ``plot``.

    Args:
        results: results of `train`, keyed by the names for the legend.

    Returns:
        A matplotlib figure. A notebook shows it; ``figure.savefig("curves.png")`` saves it.

    Raises:
        TypeError: if ``results`` is not a mapping to training results.
        ValueError: if ``results`` is empty, or a result lacks epochs.
    """
    if not isinstance(results, Mapping) or not all(isinstance(found, TrainResult) for found in results.values()):
        raise TypeError(f"results: got {type(results).__name__}, expected training results by name: {{'LAD': result}}")
    empty = [name for name, found in results.items() if not found.epochs]
    if empty or not results:
        raise ValueError(
            f"results: got {'no epochs for ' + repr(empty[0]) if empty else 'none'}, expected some to draw"
        )
    figure, panels = _panels()
    accuracies: dict[str, list[float | None]] = {}
    for name, found in results.items():
        clean, robust = found._validated("clean"), found._validated("robust")
        measured = any(value is not None for value in clean)
        accuracies[name] = clean if measured else [epoch.accuracy for epoch in found.epochs]
        if any(value is not None for value in robust):
            accuracies[f"{name}, robust"] = robust
    _draw(panels[0], {name: [epoch.loss for epoch in found.epochs] for name, found in results.items()})
    _draw(panels[1], accuracies)
    _draw(panels[2], {name: [epoch.ratio for epoch in found.epochs] for name, found in results.items()}, log=True)
    _draw(panels[3], {name: [epoch.strength for epoch in found.epochs] for name, found in results.items()})
    return figure


def _panels() -> tuple[Figure, list[Axes]]:
    """Return a figure and its four axes, with titles."""
    with extra("plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(2, 2, sharex=True).flat)
    for axes, title in zip(panels, ("training loss", "accuracy", "Eq. 16 ratio", "strength s"), strict=True):
        axes.set_title(title, fontsize="medium")
    for axes in panels[2:]:
        axes.set_xlabel("epoch")
    return figure, panels


def _draw(axes: Axes, lines: Mapping[str, Sequence[float | None]], log: bool = False) -> None:
    """Draw lines against the epochs; values that are None are left out."""
    for label, values in lines.items():
        known = [(number + 1, value) for number, value in enumerate(values) if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), ".-", label=label)
    if log and any(value is not None and value > 0 for values in lines.values() for value in values):
        axes.set_yscale("log")
    if len(lines) > 1 and axes.lines:
        axes.legend(fontsize="small")
