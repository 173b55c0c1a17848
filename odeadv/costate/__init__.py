"""The costate a(t) = dL/dx(t), recorded along a trajectory: its values at the nodes and between them.

`odeadv.solve` does all of this for an `odeadv.AdversarialField`, and ``solution.costate(t)`` gives the result. Use the
names below if you need a costate without a solve. `record` makes one forward and one backward pass. `sweep` repeats
them on the pushed trajectory until the costate stops changing.

The costate is explained in docs/theory.md, its options in a solve in docs/costate.md.
"""

from odeadv.costate._collocation import collocated
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
    "collocated",
    "record",
    "sweep",
]
