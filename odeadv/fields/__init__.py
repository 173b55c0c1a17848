"""The equation: operators (one term of dx/dt each) and the vector fields that consist of them.

A field is a sum of named operators. It may contain its problem (initial state, time span, steps).
`AdversarialField` is the paper's Eq. 7, dx/dt = f(t, x) + eta * a(t). Its second operator is the costate a(t), which
the solver records. This folder imports `odeadv.support` only.
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
