"""Table 1 of the paper: natural training with and without layer-wise adversarial defence.

    python examples/table1.py --preset smoke                                   # minutes, no download
    python examples/table1.py --preset cpu --dataset cifar10 --data DIR        # two cores, real CIFAR
    python examples/table1.py --preset paper --dataset cifar10 --data DIR      # the paper's protocol, for a GPU

Runs are in --runs, one folder each, and go on where they were stopped; a finished run is not run again, and is shared
with the other tables that need it. The page (table1.md), a plot and one JSON a run go to --out; --render makes the page
and the plot again from the JSON alone.
"""

import sys

from odeadv import experiments

if __name__ == "__main__":
    sys.exit(experiments.main("table1", __doc__))
