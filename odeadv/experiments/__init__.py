"""Which runs make which table: runs and tables as data, the code that runs them, and the report made of their JSON.

The top of the package; imports everything below it.
"""

from odeadv.experiments._report import render, write_report
from odeadv.experiments._run import RunConfig, load_records, run
from odeadv.experiments._tables import PRESETS, TABLE1, Preset, Row, Table, configurations

__all__ = [
    "PRESETS",
    "TABLE1",
    "Preset",
    "Row",
    "RunConfig",
    "Table",
    "configurations",
    "load_records",
    "render",
    "run",
    "write_report",
]
