"""Imports of optional packages: an error names the extra that brings the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import optional packages in the body; if one is not installed, say which extra of odeadv brings it.

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
