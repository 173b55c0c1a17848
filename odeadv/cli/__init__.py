"""The command ``odeadv``. This package only parses arguments and prints; it imports all other packages."""

from odeadv.cli._main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
