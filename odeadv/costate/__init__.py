"""Where a(t) = dL/dx(t) comes from: recording it along a trajectory, and evaluating it between recorded nodes.

Uses fields and the splitting loop; `odeadv.solve` is what puts them together.
"""

from odeadv.costate._record import record
from odeadv.costate._recorded import Costate, RecordedCostate, SummedCostate
from odeadv.costate._sweeps import Converge, Recordings, Sweeping

__all__ = ["Converge", "Costate", "RecordedCostate", "Recordings", "SummedCostate", "Sweeping", "record"]
