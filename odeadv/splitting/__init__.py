"""How a field is advanced: compositions (`Scheme`), sub-steps (`SubStep`), the time grid and the loop over it.

The two choices are orthogonal: a scheme says which operator acts for how long and at what time of its clock, a
sub-step says how one operator is advanced over such a stage. Knows fields, but nothing of where a costate comes from.
"""

from odeadv.splitting import schemes
from odeadv.splitting._adaptive import Adaptive, Search, choose_grid, embedded, palindromic
from odeadv.splitting._grid import Grid, TimeStep, make_grid
from odeadv.splitting._nested import Nested
from odeadv.splitting._scheme import CostateKind, Scheme, Stage
from odeadv.splitting._stepper import Stepper
from odeadv.splitting._substep import Clock, Exact, RungeKutta, SubStep, TorchDiffEq, get_substep, substep_names
from odeadv.splitting.status import Outcome

__all__ = [
    "Adaptive",
    "Clock",
    "CostateKind",
    "Exact",
    "Grid",
    "Nested",
    "Outcome",
    "RungeKutta",
    "Scheme",
    "Search",
    "Stage",
    "Stepper",
    "SubStep",
    "TimeStep",
    "TorchDiffEq",
    "choose_grid",
    "embedded",
    "get_substep",
    "make_grid",
    "palindromic",
    "schemes",
    "substep_names",
]
