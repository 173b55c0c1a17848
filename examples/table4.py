"""Table 4 of the paper, noise with PGD training: the same as ``python examples/table.py table4``."""

import sys

from odeadv.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "table4", *sys.argv[1:]]))
