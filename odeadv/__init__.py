"""odeadv: layer-wise adversarial defence as an ODE, dx/dt = f(t, x) + eta * dL/dx, and splitting solvers for it.

Here x is the state of a residual network at depth t, and f is a residual block. L is the loss, and eta is the strength
of the adversarial term. ``odeadv.solve(field, x0, t_span, scheme="strang", dt=0.1)`` solves plain, split and
adversarial fields. ``odeadv.models`` has residual networks that are such fields. ``odeadv.attacks`` and
``odeadv.evaluate`` measure robust accuracy.

``odeadv.data``, ``odeadv.training``, ``odeadv.diagnostics``, ``odeadv.audit`` and ``odeadv.experiments`` are imported
when they are first used. The packages that plots and training need are also imported on first use.
"""

import importlib
from typing import TYPE_CHECKING

from odeadv import attacks, models
from odeadv._version import __version__
from odeadv.costate import Converge
from odeadv.evaluation import evaluate
from odeadv.fields import AdversarialField, Newton, Operator, Piecewise, SplitField, VectorField
from odeadv.solver import Solution, SolveError, Stats, compile_solver, driven, solve
from odeadv.splitting import (
    DIRK,
    Adaptive,
    Nested,
    RungeKutta,
    Scheme,
    Stage,
    SubStep,
    TorchDiffEq,
    schemes,
    substep_names,
)
from odeadv.splitting.method import AccuracyWarning
from odeadv.splitting.status import Status

__all__ = [
    "DIRK",
    "AccuracyWarning",
    "Adaptive",
    "AdversarialField",
    "Converge",
    "Nested",
    "Newton",
    "Operator",
    "Piecewise",
    "RungeKutta",
    "Scheme",
    "Solution",
    "SolveError",
    "SplitField",
    "Stage",
    "Stats",
    "Status",
    "SubStep",
    "TorchDiffEq",
    "VectorField",
    "__version__",
    "attacks",
    "compile_solver",
    "driven",
    "evaluate",
    "models",
    "schemes",
    "solve",
    "substep_names",
]

if TYPE_CHECKING:
    from odeadv import audit as audit
    from odeadv import data as data
    from odeadv import diagnostics as diagnostics
    from odeadv import experiments as experiments
    from odeadv import training as training

# These folders are not in __all__, because `from odeadv import *` would import them.
_ON_DEMAND = ("audit", "data", "diagnostics", "experiments", "training")
_FOLDERS = ("costate", "evaluation", "fields", "solver", "splitting")


def __getattr__(name: str) -> object:
    """Import a folder that is slow to import, on its first use."""
    if name in _ON_DEMAND:
        return importlib.import_module(f"odeadv.{name}")
    raise AttributeError(f"module 'odeadv' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names that tab completion offers."""
    return sorted({*__all__, *_ON_DEMAND, *_FOLDERS})
