"""Figure 2 of the paper, the ratio of Eq. 16: the same as ``python examples/table.py figure2``."""

import sys

from odeadv.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "figure2", *sys.argv[1:]]))
