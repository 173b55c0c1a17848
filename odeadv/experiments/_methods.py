"""The methods of the paper by name: ``pgd+lad-sm+noise`` is an objective, then what is added to it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from odeadv.splitting import schemes
from odeadv.training.defences import Defence, Layerwise, Undefended
from odeadv.training.defences._layerwise import Perturbation
from odeadv.training.objectives import Natural, Objective, Pgd, Trades

if TYPE_CHECKING:
    from odeadv.experiments._config import RunConfig

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
    """

    objective: str
    scheme: str | None = None
    perturbation: Perturbation = "costate"
    damping: Literal["damp", "lambda-damp"] | None = None
    noise: bool = False
    zero: bool = False
    sweeps: int = 1
    matched: bool = False

    def defence(self, eta: float) -> Defence:
        """Its defence with strength ``eta``."""
        if self.scheme is None:
            return Undefended()
        return Layerwise(self.scheme, 0.0 if self.zero else eta, self.sweeps, None, self.perturbation)

    def attack(self, steps: int, eps: float, alpha: float) -> Objective:
        """Its objective, with the attack trained on."""
        if self.objective == "natural":
            return Natural()
        return (Pgd if self.objective == "pgd" else Trades)(eps=eps, alpha=alpha, steps=steps)


def parse_method(name: str) -> Method:
    """The method called ``name``: an objective, then parts joined by "+".

    Parts: ``damp``, ``lambda-damp``; ``lad``, ``lad-sm``, ``lad-midpoint``, ``lad-symmetric`` (schemes ``"lie"``,
    ``"strang"``, ``"strang-midpoint"``, ``"strang-symmetric"``), with ``sweeps2`` and the like; for ablations
    ``random``, ``shuffled``, ``input`` (what drives the state) and ``eta0`` (eta = 0; for TRADES the mix of losses is
    what is left); ``noise``; and ``matched``, without a defence, for more epochs: as many passes as with LAD.

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
    if "scheme" in found and "matched" in found:
        raise ValueError(f"method: {name!r} has a defence, whose passes it cannot be matched to")
    return Method(objective, **found)  # type: ignore[arg-type]


def _part(name: str, part: str) -> tuple[str, object]:
    if part in DAMPINGS:
        return "damping", part
    if part in DEFENCES:
        return "scheme", DEFENCES[part]
    if part in PERTURBATIONS:
        return "perturbation", part
    if part == "matched":
        return "matched", True
    if part == "noise":
        return "noise", True
    if part == "eta0":
        return "zero", True
    if part.startswith("sweeps") and part[6:].isdigit() and int(part[6:]) >= 1:
        return "sweeps", int(part[6:])
    known = [*DAMPINGS, *DEFENCES, *PERTURBATIONS, "noise", "eta0", "sweeps2", "matched"]
    near = "".join(f"; did you mean {match!r}?" for match in difflib.get_close_matches(part, known, n=1))
    raise ValueError(f"method: {part!r} in {name!r} is not known{near}; parts are {', '.join(known)}")


def method_of(config: RunConfig) -> str:
    """The name of the method that ``config`` runs; objectives, defences and schemes of one's own by their names."""
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
    """Passes through the network that a training step makes: forward, to activations and weight gradients count 1 each.

    A pass that is trained on counts 3, an attack step or a recording 2; the exact midpoint 2 more.
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
    return trained


assert set(get_args(Perturbation)) == {"costate", *PERTURBATIONS}
