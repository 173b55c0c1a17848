"""Imports of optional packages. If a package is missing, the error names the extra that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Run a body that imports optional packages. If one is missing, the error names ``name``, the extra of odeadv.

    Raises:
        ModuleNotFoundError: if a package outside odeadv is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "odeadv"):
            raise
        message = f"{package}: is not installed; expected the extra {name!r}: pip install 'odeadv[{name}]'"
        raise ModuleNotFoundError(message, name=error.name) from None
