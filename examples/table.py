"""Make any table of the paper at any size.

    python examples/table.py table1 --preset smoke                                  # minutes, no download
    python examples/table.py table1 --preset cpu --dataset cifar10 --data DIR       # two cores, real CIFAR
    python examples/table.py table1 --preset paper --dataset cifar10 --data DIR     # the paper's protocol, for a GPU
    python examples/table.py ablations --preset smoke                               # controls and ablations
    python examples/table.py --list --preset paper                                  # the cost of all tables

Each run has a folder in --runs. If a run is stopped, the same command resumes it. Tables share their runs. The page, a
plot and one JSON file per run go to --out; --render makes the page and the plot again from the JSON files.
"""

import sys

from odeadv.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", *sys.argv[1:]]))
