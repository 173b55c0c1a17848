"""Table 2 of the paper, PGD training: the same as ``python examples/table.py table2``."""

import sys

from odeadv.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "table2", *sys.argv[1:]]))
