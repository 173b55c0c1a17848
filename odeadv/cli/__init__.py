"""The command ``odeadv``: argument parsing only. Imports every folder below."""

from odeadv.cli._main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
