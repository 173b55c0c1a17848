"""What the equation is: operators (one term of dx/dt each) and the vector fields made of them.

A field is a named sum of operators, and may carry its own problem (initial state, time span, steps).
`AdversarialField` is the paper's Eq. 7, dx/dt = f(t, x) + eta * a(t); its second operator, the costate, is recorded
by the solver. Imports nothing from the rest of the package but how to run a user's modules without a trace.
"""

from odeadv.fields._field import AdversarialField, Problem, SplitField, VectorField, as_field
from odeadv.fields.operator import Jump, Operator
from odeadv.fields.residual import Residual
from odeadv.fields.terms import Forcing, Piecewise

__all__ = [
    "AdversarialField",
    "Forcing",
    "Jump",
    "Operator",
    "Piecewise",
    "Problem",
    "Residual",
    "SplitField",
    "VectorField",
    "as_field",
]
