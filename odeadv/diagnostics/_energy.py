"""The Hamiltonian along a solution, the energy of the perturbation, and the rise of the loss per energy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from odeadv.diagnostics._result import Result, style
from odeadv.diagnostics._trajectory import (
    AnyField,
    Trajectory,
    inner,
    needs_loss,
    norm,
    posed,
    quotient,
    trajectory_of,
    walk,
)
from odeadv.fields import AdversarialField, Jump, Operator
from odeadv.fields.operator import Cost
from odeadv.solver import Solution, driven, solve
from odeadv.splitting import Clock, Scheme, SubStep, get_substep
from odeadv.splitting.method import AccuracyWarning, read_discretisation
from odeadv.support.isolation import without_effects

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Hamiltonian(Result):
    """The Hamiltonian H = a . f(t, x) + (eta / 2) |a|^2 at both ends of each layer that is an ODE step.

    Attributes:
        layers: numbers of the layers; jumps are left out.
        starts, stops: times at the beginnings and at the ends of the layers.
        values: H at the beginning of each layer, with the f of this layer.
        ends: H at the end of each layer, with the same f.
        layer_drift: ``ends`` minus ``values``.
        drift: for a field without pieces, the largest |H(t_n) - H(t_0)|. For a field with pieces, the largest size in
            ``layer_drift``, because H changes with f between two pieces.
        relative_drift: ``drift`` divided by the largest |H|.
        eta: strength of the field.
    """

    layers: list[int]
    starts: list[float]
    stops: list[float]
    values: list[float]
    ends: list[float]
    layer_drift: list[float]
    drift: float
    relative_drift: float
    eta: float

    heading: ClassVar[str] = "Hamiltonian"
    reading: ClassVar[str] = (
        "Constant within a layer for exact dynamics; the drift is the error of steps and of the costate's recording."
    )

    def summary(self) -> dict[str, float]:
        """Return the most important numbers of the result, by name."""
        return {
            "relative drift": self.relative_drift,
            "drift": self.drift,
        }

    def _draw(self, axes: Axes, label: str) -> None:
        times = [t for pair in zip(self.starts, self.stops, strict=True) for t in (*pair, float("nan"))]
        levels = [h for pair in zip(self.values, self.ends, strict=True) for h in (*pair, float("nan"))]
        axes.plot(times, levels, marker=".", label=label)
        style(axes, x="t (layer)", y="H", title="Hamiltonian: level within a layer for exact dynamics")


def hamiltonian(
    field: AnyField,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    solution: Solution | None = None,
    dt: float | None = None,
    steps: int | None = None,
    substep: Any = None,
    scheme: str | Scheme = "strang",
    sweeps: Any = None,
) -> Hamiltonian:
    """Measure the Hamiltonian of Pontryagin's principle along a solution, and its drift. It is an accuracy check.

    If f does not depend on time, H is constant along the exact solution of Eq. 7 and 9. With ``sweeps="converge"`` the
    drift of H is therefore the error of the scheme. With one recording, a is not the costate of the trajectory that it
    drives, so a part of the drift remains for any step size.

    Args:
        field: an `AdversarialField`.
        x0: as for `odeadv.solve`.
        t_span: as for `odeadv.solve`.
        dt: as for `odeadv.solve`.
        steps: as for `odeadv.solve`.
        substep: as for `odeadv.solve`. For a network give ``**net.solve_options``.
        solution: a solution of ``field`` with ``save_at="steps"``; by default the function solves the field.
        scheme: scheme of the perturbed trajectory.
        sweeps: as for `odeadv.solve`.

    Raises:
        TypeError, ValueError: if an argument does not fit, before the solve starts. The message names the argument.
        SolveError: if the solve fails.
    """
    adversarial = needs_loss("hamiltonian", field)
    if solution is not None:
        if any(value is not None for value in (x0, t_span, dt, steps, substep, sweeps)):
            raise ValueError("solution: got one with x0, t_span, dt, steps, substep or sweeps, expected it alone")
        if len(solution.ts) != solution.stats.steps + 1:
            raise ValueError(
                f"solution: got {len(solution.ts)} states of {solution.stats.steps + 1}, expected all of them; solve "
                "with save_at='steps'"
            )
        return hamiltonian_of(trajectory_of(solution, adversarial))
    return hamiltonian_of(walk(posed(field, x0, t_span, dt, steps), substep, scheme=scheme, sweeps=sweeps))


def hamiltonian_of(trajectory: Trajectory) -> Hamiltonian:
    """Return the result of `hamiltonian` for a trajectory with costates."""
    layers, starts, stops, values, ends = [], [], [], [], []
    with trajectory.quiet():
        for layer in trajectory.layers():
            if isinstance(layer.piece, Jump):
                continue
            assert layer.a is not None
            assert layer.a_end is not None
            layers.append(layer.index)
            starts.append(layer.step.t0)
            stops.append(layer.step.t1)
            values.append(_level(trajectory, layer.a, layer.velocity()))
            ends.append(_level(trajectory, layer.a_end, layer.velocity(layer.end, layer.step.t1)))
    layer_drift = [end - value for value, end in zip(values, ends, strict=True)]
    pieces = bool(trajectory.operator.edges)
    changes = layer_drift if pieces or not values else [level - values[0] for level in (*values, ends[-1])]
    drift = max(map(abs, changes), default=0.0)
    return Hamiltonian(
        layers=layers,
        starts=starts,
        stops=stops,
        values=values,
        ends=ends,
        layer_drift=layer_drift,
        drift=drift,
        relative_drift=quotient(drift, max(map(abs, (*values, *ends)), default=0.0)),
        eta=trajectory.eta,
    )


def _level(trajectory: Trajectory, a: Tensor, f: Tensor) -> float:
    return inner(a, f) + 0.5 * trajectory.eta * norm(a) ** 2


@dataclass(frozen=True)
class Energy(Result):
    """The energy of the perturbation, (1 / (2 eta)) * integral |eta a|^2 dt, and the rise of the loss, per scheme.

    Attributes:
        plain_loss: loss without the perturbation.
        energy: (eta / 2) * integral |a|^2 dt of the recorded costate a, by the trapezoidal rule on its nodes.
        schemes: names of the schemes.
        spent: the energy that each scheme spends. A costate stage that moves the state by d in a time h costs
            |d|^2 / (2 eta h). In a mixture, this cost is multiplied by the factor of its table.
        losses: loss with each scheme.
        loss_rise: ``losses`` minus ``plain_loss``.
        loss_per_energy: ``loss_rise`` / ``spent``. It is 2 for a small eta: to first order the loss rises by
            eta * integral |a|^2 dt, which is twice the energy.
        eta: strength of the field.
    """

    plain_loss: float
    energy: float
    schemes: list[str]
    spent: list[float]
    losses: list[float]
    loss_rise: list[float]
    loss_per_energy: list[float]
    eta: float

    heading: ClassVar[str] = "Energy of the perturbation"
    reading: ClassVar[str] = "The rise of the loss per unit of energy of the perturbation; 2 for a weak perturbation."

    def summary(self) -> dict[str, float]:
        """Return the most important numbers of the result, by name."""
        return {
            "plain loss": self.plain_loss,
            "energy": self.energy,
            **{
                f"rise per energy, {name}": value
                for name, value in zip(self.schemes, self.loss_per_energy, strict=True)
            },
        }

    def _draw(self, axes: Axes, label: str) -> None:
        axes.plot(self.schemes, self.loss_per_energy, marker="o", linestyle="", label=label)
        axes.tick_params(axis="x", rotation=20)
        style(axes, x="", y="rise of the loss per energy", title="Rise of the loss per unit of energy")


def energy(
    field: AnyField,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    schemes: Sequence[str | Scheme] = ("lie", "strang", "strang-midpoint", "strang-symmetric"),
    dt: float | None = None,
    steps: int | None = None,
    substep: Any = None,
    sweeps: Any = None,
) -> Energy:
    """Measure the energy that each scheme spends and the rise of the loss, on the same problem and steps.

    Args:
        field: an `AdversarialField` with an eta different from 0.
        x0: as for `odeadv.solve`.
        t_span: as for `odeadv.solve`.
        dt: as for `odeadv.solve`.
        steps: as for `odeadv.solve`.
        substep: as for `odeadv.solve`. For a network give ``**net.solve_options``.
        schemes: the schemes to compare.
        sweeps: as for `odeadv.solve`.

    Raises:
        TypeError, ValueError: if an argument does not fit, before the solve starts. The message names the argument.
        SolveError: if a solve fails.
    """
    adversarial = needs_loss("energy", field)
    if adversarial.eta == 0.0:
        raise ValueError("field: got eta = 0, expected another value: without a perturbation the energy is not defined")
    if isinstance(schemes, str | Scheme) or not schemes:
        raise ValueError(f"schemes: got {schemes!r}, expected a sequence of at least one")
    return energy_of(walk(posed(field, x0, t_span, dt, steps), substep), schemes, substep, sweeps)


def energy_of(plain: Trajectory, names: Sequence[str | Scheme], substep: Any, sweeps: Any = None) -> Energy:
    """Return the result of `energy` for the field of the unperturbed trajectory ``plain``."""
    field, plain_loss = plain.field, plain.loss()
    assert isinstance(field, AdversarialField)
    eta = plain.eta
    given = substep if isinstance(substep, Mapping) else dict.fromkeys(("f", "costate"), substep or "euler")
    spent, losses = [], []
    for scheme in names:
        with torch.inference_mode(False), torch.no_grad(), without_effects(field.modules, plain.states[0].device):
            along = driven(field, substep=substep, scheme=scheme, sweeps=sweeps)
            with warnings.catch_warnings():  # `driven` has already given the warning about sub-steps
                warnings.simplefilter("ignore", AccuracyWarning)
                meter = _Meter(get_substep(given.get("costate", "euler")), eta, _factors(field, scheme))
                metered = {"f": given.get("f", "euler"), "costate": meter}
                final = solve(along, substep=metered, scheme=scheme).xs[-1]
            losses.append(float(field.evaluate(final)[1]))
        spent.append(meter.spent)
    rise = [loss - plain_loss for loss in losses]
    return Energy(
        plain_loss=plain_loss,
        energy=_trapezoid(plain),
        schemes=[scheme if isinstance(scheme, str) else scheme.name for scheme in names],
        spent=spent,
        losses=losses,
        loss_rise=rise,
        loss_per_energy=[quotient(up, cost) for up, cost in zip(rise, spent, strict=True)],
        eta=eta,
    )


class _Meter:
    """A sub-step of the costate that adds up the energy of its changes of the state.

    Args:
        method: the sub-step that advances the state.
        eta: strength of the field.
        factors: the factor of the table of each costate stage, in the order of the stages in a step.
    """

    def __init__(self, method: SubStep, eta: float, factors: Sequence[float]) -> None:
        self.method, self.eta, self.factors = method, eta, cycle(factors)
        self.name, self.order = method.name, method.order
        self.spent = 0.0

    def advance(self, operator: Operator, clock: Clock, h: float, x: Tensor, cost: Cost) -> Tensor:
        """See `odeadv.splitting.SubStep.advance`."""
        # The change starts from a zero state, because the difference of two states would lose digits.
        moved = self.method.advance(operator, clock, h, torch.zeros_like(x), Cost())
        self.spent += next(self.factors) * norm(moved) ** 2 / (2.0 * self.eta * h)
        return self.method.advance(operator, clock, h, x, cost)


def _factors(field: AdversarialField, scheme: str | Scheme) -> list[float]:
    """Return, for each costate stage in a step, the factor of its table. The factor is 1 if the field is not split."""
    table = read_discretisation(field, scheme, None, None).scheme
    if table is None:
        return [1.0]
    costate = list(field.operators).index("costate")
    return [factor for factor, stages in table.compositions if factor for s in stages if s.operator == costate]


def _trapezoid(trajectory: Trajectory) -> float:
    squares = [norm(a) ** 2 for a in trajectory.costates]
    pairs = zip(trajectory.grid, pairwise(squares), strict=True)
    return 0.5 * trajectory.eta * sum(0.5 * step.h * (a + b) for step, (a, b) in pairs)
