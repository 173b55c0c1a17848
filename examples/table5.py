"""Table 5 of the paper: the effect of eta, PGD training, CIFAR-100.

    python examples/table5.py --preset smoke                                   # minutes, no download
    python examples/table5.py --preset cpu --dataset cifar100 --data DIR       # two cores, real CIFAR
    python examples/table5.py --preset paper --dataset cifar100 --data DIR     # the paper's protocol, for a GPU

Runs are in --runs, one folder each, and go on where they were stopped; a finished run is not run again, and is shared
with the other tables that need it. The page (table5.md), a plot and one JSON a run go to --out; --render makes the page
and the plot again from the JSON alone.
"""

import sys

from odeadv import experiments

if __name__ == "__main__":
    sys.exit(experiments.main("table5", __doc__))
