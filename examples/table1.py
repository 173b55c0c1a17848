"""Table 1 of the paper, natural training: the same as ``python examples/table.py table1``."""

import sys

from odeadv.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "table1", *sys.argv[1:]]))
