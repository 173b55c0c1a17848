"""Table 7 of the paper, noise on CIFAR-100: the same as ``python examples/table.py table7``."""

import sys

from odeadv.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "table7", *sys.argv[1:]]))
