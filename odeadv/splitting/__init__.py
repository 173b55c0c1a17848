"""The method: compositions (`Scheme`), sub-steps (`SubStep`), and the time grid on which they act.

A composition is a table of stages. Each stage gives the operator that acts, for which part of the step, and the time on
its clock. A sub-step is the method that advances one operator over one stage: Euler, `RungeKutta`, `DIRK`, an exact
flow. You choose the two independently, ``solve(..., scheme="strang", substep="midpoint")``. The names below are for
schemes and sub-steps of your own; docs/solver.md has examples of both, and docs/choosing.md says which to take.
"""

from odeadv.splitting import schemes
from odeadv.splitting._adaptive import Adaptive, Search, choose_grid, doubling, palindromic
from odeadv.splitting._grid import Grid, TimeStep, make_grid
from odeadv.splitting._nested import Nested
from odeadv.splitting._scheme import CostateKind, Scheme, Stage
from odeadv.splitting._stepper import Stepper
from odeadv.splitting._substep import DIRK, Clock, Exact, RungeKutta, SubStep, TorchDiffEq, get_substep, substep_names
from odeadv.splitting.status import Status

__all__ = [
    "DIRK",
    "Adaptive",
    "Clock",
    "CostateKind",
    "Exact",
    "Grid",
    "Nested",
    "RungeKutta",
    "Scheme",
    "Search",
    "Stage",
    "Status",
    "Stepper",
    "SubStep",
    "TimeStep",
    "TorchDiffEq",
    "choose_grid",
    "doubling",
    "get_substep",
    "make_grid",
    "palindromic",
    "schemes",
    "substep_names",
]
