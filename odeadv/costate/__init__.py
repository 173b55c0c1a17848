"""Where a(t) = dL/dx(t) comes from: recording it along a trajectory, and evaluating it between recorded nodes.

Uses fields and the splitting loop; `odeadv.solve` is what puts them together.
"""

from odeadv.costate._record import record
from odeadv.costate._recorded import Costate, RecordedCostate, SummedCostate

__all__ = ["Costate", "RecordedCostate", "SummedCostate", "record"]
