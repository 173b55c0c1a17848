"""The equation: operators (one term of dx/dt each) and the vector fields made of them.

A field is a named sum of operators, and may carry its own problem (initial state, time span, steps).
`AdversarialField` is the paper's Eq. 7, dx/dt = f(t, x) + eta * a(t). The solver records its second operator, the
costate. Imports `odeadv.support` only.
"""

from odeadv.fields._field import AdversarialField, Loss, Problem, SplitField, VectorField, as_field
from odeadv.fields._span import MovingSpan
from odeadv.fields.operator import Jump, Newton, Operator
from odeadv.fields.residual import Residual
from odeadv.fields.terms import Forcing, Piecewise

__all__ = [
    "AdversarialField",
    "Forcing",
    "Jump",
    "Loss",
    "MovingSpan",
    "Newton",
    "Operator",
    "Piecewise",
    "Problem",
    "Residual",
    "SplitField",
    "VectorField",
    "as_field",
]
