"""Solving: `solve`, `driven` and `compile_solver` read their arguments into one request and return a `Solution`.

Imports `odeadv.support`, `odeadv.fields`, `odeadv.splitting` and `odeadv.costate`.
"""

from odeadv.solver._compiled import CompiledSolver, compile_solver
from odeadv.solver._loop import CompileWarning
from odeadv.solver._solution import Solution, SolveError, Stats
from odeadv.solver._solve import driven, solve

__all__ = ["CompileWarning", "CompiledSolver", "Solution", "SolveError", "Stats", "compile_solver", "driven", "solve"]
