"""Entry point for tools that still call `setup.py`; everything it needs is declared in `pyproject.toml`."""

from setuptools import setup

setup()
