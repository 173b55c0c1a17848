"""Table 5 of the paper, the effect of eta: the same as ``python examples/table.py table5``."""

import sys

from odeadv.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "table5", *sys.argv[1:]]))
