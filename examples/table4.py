"""Table 4 of the paper: noise after every residual sum, alone and with layer-wise adversarial defence, CIFAR-10.

    python examples/table4.py --preset smoke                                   # minutes, no download
    python examples/table4.py --preset cpu --dataset cifar10 --data DIR        # two cores, real CIFAR
    python examples/table4.py --preset paper --dataset cifar10 --data DIR      # the paper's protocol, for a GPU

Runs are in --runs, one folder each, and go on where they were stopped; a finished run is not run again, and is shared
with the other tables that need it. The page (table4.md), a plot and one JSON a run go to --out; --render makes the page
and the plot again from the JSON alone.
"""

import sys

from odeadv import experiments

if __name__ == "__main__":
    sys.exit(experiments.main("table4", __doc__))
