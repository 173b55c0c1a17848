"""Diagnostics of the dynamics of any field, including trained networks. Each returns plain data with a `plot`.

A network is a field here: ``odeadv.diagnostics.perturbation(net.field(images, labels, eta), **net.solve_options)``.
`diagnose` runs all diagnostics and writes one page. `perturbation` measures how strong a push is, and is the one to
start with (docs/tutorials/strength.md). docs/diagnostics.md explains every number.
"""

from odeadv.diagnostics._contraction import Contraction, contraction
from odeadv.diagnostics._costate import CostateResidual, costate_residual
from odeadv.diagnostics._energy import Energy, Hamiltonian, energy, hamiltonian
from odeadv.diagnostics._growth import Growth, Lipschitz, growth, lipschitz
from odeadv.diagnostics._perturbation import Perturbation, perturbation
from odeadv.diagnostics._report import Diagnosis, diagnose
from odeadv.diagnostics._result import Result
from odeadv.diagnostics._second_order import SecondOrder, second_order
from odeadv.diagnostics._trace import Trace

__all__ = [
    "Contraction",
    "CostateResidual",
    "Diagnosis",
    "Energy",
    "Growth",
    "Hamiltonian",
    "Lipschitz",
    "Perturbation",
    "Result",
    "SecondOrder",
    "Trace",
    "contraction",
    "costate_residual",
    "diagnose",
    "energy",
    "growth",
    "hamiltonian",
    "lipschitz",
    "perturbation",
    "second_order",
]
