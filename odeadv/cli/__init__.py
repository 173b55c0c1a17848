"""The command ``odeadv``: argument parsing only. Imports every folder below."""

from ._main import main

__all__ = ["main"]
