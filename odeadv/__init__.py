"""odeadv: layer-wise adversarial defence as an ODE, dx/dt = f(t, x) + eta * dL/dx, and splitting solvers for it.

``odeadv.solve(field, x0, t_span, scheme="strang", dt=0.1)`` solves plain, split and adversarial fields;
``odeadv.models`` has residual networks that are such fields; ``odeadv.attacks`` and ``odeadv.evaluate`` measure
robust accuracy. Training, data and plotting are imported only when used.
"""

from odeadv import attacks, diagnostics, models
from odeadv._version import __version__
from odeadv.costate import Converge
from odeadv.evaluation import evaluate
from odeadv.fields import AdversarialField, Operator, SplitField, VectorField
from odeadv.solver import Solution, SolveError, Stats, compile_solver, driven, solve
from odeadv.splitting import Adaptive, Nested, Scheme, Stage, TorchDiffEq, schemes, substep_names
from odeadv.splitting.method import AccuracyWarning
from odeadv.splitting.status import Status

__all__ = [
    "AccuracyWarning",
    "Adaptive",
    "AdversarialField",
    "Converge",
    "Nested",
    "Operator",
    "Scheme",
    "Solution",
    "SolveError",
    "SplitField",
    "Stage",
    "Stats",
    "Status",
    "TorchDiffEq",
    "VectorField",
    "__version__",
    "attacks",
    "compile_solver",
    "diagnostics",
    "driven",
    "evaluate",
    "models",
    "schemes",
    "solve",
    "substep_names",
]
