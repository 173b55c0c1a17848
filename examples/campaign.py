"""Run stages of the campaign that tests the paper's claims (docs/results/rules.md).

    python examples/campaign.py 2a 4 1 --data DIR --runs RUNS --records docs/results/runs

If a stage was stopped, the same command resumes it. Run one process with one thread per core: OMP_NUM_THREADS=1.
"""

import argparse
from pathlib import Path

from odeadv.experiments import STAGES, run_stage

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("stages", nargs="+", choices=STAGES)
parser.add_argument("--data", type=Path, required=True, help="folder with cifar10.npz")
parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
parser.add_argument("--records", type=Path, default=Path("records"), help="folder for one JSON file per run")
parser.add_argument("--seeds", type=int, nargs="+", help="some of the seeds of each stage")

if __name__ == "__main__":
    args = parser.parse_args()
    for name in args.stages:
        for failure in run_stage(STAGES[name], args.runs, args.data, args.records, args.seeds):
            print(f"{failure.job.config.name}: {failure.reason}")
