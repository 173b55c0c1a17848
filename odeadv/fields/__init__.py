"""The equation: operators (one term of dx/dt each) and the vector fields that consist of them.

A field is a sum of named operators. It may contain its problem: the initial state, the time span and the steps.
`SplitField` adds operators of your own. `AdversarialField` is the paper's Eq. 7, dx/dt = f(t, x) + eta * a(t). Its
second operator is the costate a(t), the gradient of the loss with respect to the state, which the solver records. A
plain function f(t, x) is a field too. docs/solver.md shows how fields are written and solved.
"""

from odeadv.fields._cost import Cost
from odeadv.fields._field import AdversarialField, Loss, Problem, SplitField, VectorField, as_field
from odeadv.fields._span import MovingSpan
from odeadv.fields.operator import Jump, Newton, Operator
from odeadv.fields.residual import Residual
from odeadv.fields.terms import Forcing, Piecewise

__all__ = [
    "AdversarialField",
    "Cost",
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
