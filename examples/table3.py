"""Table 3 of the paper, TRADES: the same as ``python examples/table.py table3``."""

import sys

from odeadv.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "table3", *sys.argv[1:]]))
