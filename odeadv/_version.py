"""The one place where the version is written; `pyproject.toml` and `odeadv.__version__` read it here."""

__version__ = "0.1.0"
