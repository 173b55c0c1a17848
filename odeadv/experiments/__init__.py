"""Runs and tables as data: which training makes which row, and pages made from the JSON records of finished runs.

The command ``odeadv`` calls these functions, and most readers need only the command (docs/api/command.md). From Python,
`run` trains and evaluates one `RunConfig`, and `launch` does so for a list of them. `load_records` reads finished
runs, and `write_report` makes the page of a table. docs/training.md describes configurations, presets and run folders.
"""

from odeadv.experiments._campaign import STAGES, CampaignStage, run_stage
from odeadv.experiments._claims import CLAIMS, Claim, write_claims
from odeadv.experiments._config import DataConfig, Method, ModelConfig, RunConfig, load_config, method_of, parse_method
from odeadv.experiments._cost import (
    Rehearsal,
    TableCost,
    cost_page,
    hours,
    rehearse,
    rehearse_all,
    table_costs,
    training_passes,
)
from odeadv.experiments._figure2 import METHODS, write_figure2
from odeadv.experiments._folder import RunLockedError, list_runs, load_model, plot_run
from odeadv.experiments._inspect import audit_run, diagnose_run, evaluate_run, read_evaluation
from odeadv.experiments._launch import Failure, Job, first_process, launch, make_table
from odeadv.experiments._network import run_images
from odeadv.experiments._presets import PRESETS, Preset, Size, configuration, configurations, with_eta, with_images
from odeadv.experiments._records import RecordWarning, load_record, load_records
from odeadv.experiments._report import write_report
from odeadv.experiments._rerun import Agreement, agreement, rerun
from odeadv.experiments._run import Measurement, run
from odeadv.experiments._summary import summary
from odeadv.experiments._tables import TABLES, Column, Row, Table
from odeadv.experiments._tune import tune

__all__ = [
    "CLAIMS",
    "METHODS",
    "PRESETS",
    "STAGES",
    "TABLES",
    "Agreement",
    "CampaignStage",
    "Claim",
    "Column",
    "DataConfig",
    "Failure",
    "Job",
    "Measurement",
    "Method",
    "ModelConfig",
    "Preset",
    "RecordWarning",
    "Rehearsal",
    "Row",
    "RunConfig",
    "RunLockedError",
    "Size",
    "Table",
    "TableCost",
    "agreement",
    "audit_run",
    "configuration",
    "configurations",
    "cost_page",
    "diagnose_run",
    "evaluate_run",
    "first_process",
    "hours",
    "launch",
    "list_runs",
    "load_config",
    "load_model",
    "load_record",
    "load_records",
    "make_table",
    "method_of",
    "parse_method",
    "plot_run",
    "read_evaluation",
    "rehearse",
    "rehearse_all",
    "rerun",
    "run",
    "run_images",
    "run_stage",
    "summary",
    "table_costs",
    "training_passes",
    "tune",
    "with_eta",
    "with_images",
    "write_claims",
    "write_figure2",
    "write_report",
]
