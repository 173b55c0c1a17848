"""Table 6 of the paper, stronger attacks: the same as ``python examples/table.py table6``."""

import sys

from odeadv.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "table6", *sys.argv[1:]]))
