"""The solver: `solve`, `driven` and `compile_solver`. A `Request` holds the checked arguments of a solve.

This folder imports `odeadv.support`, `odeadv.fields`, `odeadv.splitting` and `odeadv.costate`.
"""

from odeadv.solver._compiled import CompiledSolver, compile_solver
from odeadv.solver._loop import CompileWarning
from odeadv.solver._solution import Solution, SolveError, Stats
from odeadv.solver._solve import driven, solve

__all__ = ["CompileWarning", "CompiledSolver", "Solution", "SolveError", "Stats", "compile_solver", "driven", "solve"]
