"""``python -m odeadv`` is the command ``odeadv``."""

import sys

from odeadv.cli import main

sys.exit(main())
