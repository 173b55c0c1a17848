"""Which runs make which table: runs and tables as data, the code that runs them, and the report made of their JSON.

The top of the package; imports everything below it.
"""

from odeadv.experiments._campaign import STAGES, Stage, run_stage
from odeadv.experiments._claims import CLAIMS, Claim, write_claims
from odeadv.experiments._command import add_table_arguments, main, make_table
from odeadv.experiments._config import DataConfig, Method, ModelConfig, RunConfig, load_config, method_of, parse_method
from odeadv.experiments._cost import Budget, Rehearsal, budget, rehearse, write_budget
from odeadv.experiments._figure2 import write_figure2
from odeadv.experiments._folder import RunLockedError, list_runs, load_model, load_record, load_records
from odeadv.experiments._launch import Failure, Job, launch
from odeadv.experiments._presets import PRESETS, Preset, Size, configuration, configurations, with_eta
from odeadv.experiments._report import render, write_report
from odeadv.experiments._rerun import Agreement, agreement, rerun
from odeadv.experiments._run import Measurement, run
from odeadv.experiments._tables import TABLES, Column, Row, Table
from odeadv.experiments._tune import tune

__all__ = [
    "CLAIMS",
    "PRESETS",
    "STAGES",
    "TABLES",
    "Agreement",
    "Budget",
    "Claim",
    "Column",
    "DataConfig",
    "Failure",
    "Job",
    "Measurement",
    "Method",
    "ModelConfig",
    "Preset",
    "Rehearsal",
    "Row",
    "RunConfig",
    "RunLockedError",
    "Size",
    "Stage",
    "Table",
    "add_table_arguments",
    "agreement",
    "budget",
    "configuration",
    "configurations",
    "launch",
    "list_runs",
    "load_config",
    "load_model",
    "load_record",
    "load_records",
    "main",
    "make_table",
    "method_of",
    "parse_method",
    "rehearse",
    "render",
    "rerun",
    "run",
    "run_stage",
    "tune",
    "with_eta",
    "write_budget",
    "write_claims",
    "write_figure2",
    "write_report",
]
