"""Table 6 of the paper: stronger attacks (IFGSM with 20, 100 and 1000 steps) on the networks of Tables 2 and 3.

    python examples/table6.py --preset smoke                                   # minutes, no download
    python examples/table6.py --preset cpu --dataset cifar10 --data DIR        # two cores, real CIFAR
    python examples/table6.py --preset paper --dataset cifar10 --data DIR      # the paper's protocol, for a GPU

Runs are in --runs, one folder each, and go on where they were stopped; a finished run is not run again, and is shared
with the other tables that need it. The page (table6.md), a plot and one JSON a run go to --out; --render makes the page
and the plot again from the JSON alone.
"""

import sys

from odeadv import experiments

if __name__ == "__main__":
    sys.exit(experiments.main("table6", __doc__))
