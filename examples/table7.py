"""Table 7 of the paper: noise after every residual sum, PGD training, CIFAR-100.

    python examples/table7.py --preset smoke                                   # minutes, no download
    python examples/table7.py --preset cpu --dataset cifar100 --data DIR       # two cores, real CIFAR
    python examples/table7.py --preset paper --dataset cifar100 --data DIR     # the paper's protocol, for a GPU

Runs are in --runs, one folder each, and go on where they were stopped; a finished run is not run again, and is shared
with the other tables that need it. The page (table7.md), a plot and one JSON a run go to --out; --render makes the page
and the plot again from the JSON alone.
"""

import sys

from odeadv import experiments

if __name__ == "__main__":
    sys.exit(experiments.main("table7", __doc__))
