"""Figure 2 of the paper: the ratio of Eq. 16 through PGD training.

    python examples/figure2.py --preset smoke                                   # minutes, no download
    python examples/figure2.py --preset cpu --dataset cifar100 --data DIR       # two cores, real CIFAR
    python examples/figure2.py --preset paper --dataset cifar100 --data DIR     # the paper's protocol, for a GPU

The runs are those of Table 2 and are shared with it. The page (figure2.md) and the plot go to --out.
"""

import sys

from odeadv import experiments

if __name__ == "__main__":
    sys.exit(experiments.main("figure2", __doc__))
