"""The solver: `solve` for equations, `driven` for other solvers, and `compile_solver` for repeated fast solves.

`solve` takes a field, an initial state and a time span, and returns a `Solution`. `driven` turns an adversarial field
into a plain function of (t, x) that other solvers take. `compile_solver` compiles a whole solve. docs/solver.md
explains what is computed, docs/speed.md what it costs, and docs/choosing.md which options to take.
"""

from odeadv.solver._compiled import CompiledSolver, compile_solver
from odeadv.solver._loop import CompileWarning
from odeadv.solver._solution import Solution, SolveError, Stats
from odeadv.solver._solve import driven, solve

__all__ = ["CompileWarning", "CompiledSolver", "Solution", "SolveError", "Stats", "compile_solver", "driven", "solve"]
