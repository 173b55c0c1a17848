"""The costate a(t) = dL/dx(t): its recording along a trajectory, its values between nodes, and converging sweeps.

This folder imports `odeadv.support`, `odeadv.fields` and `odeadv.splitting`. It does not import the solver. Instead, a
solve gives `sweep` a function that makes one recording.
"""

from odeadv.costate._converge import Recorder, coarser
from odeadv.costate._record import record
from odeadv.costate._recorded import Costate, RecordedCostate, SummedCostate
from odeadv.costate._settings import Converge, Recordings
from odeadv.costate._sweeps import Swept, sweep
from odeadv.costate._total import Rule, TotalLoss

__all__ = [
    "Converge",
    "Costate",
    "RecordedCostate",
    "Recorder",
    "Recordings",
    "Rule",
    "SummedCostate",
    "Swept",
    "TotalLoss",
    "coarser",
    "record",
    "sweep",
]
