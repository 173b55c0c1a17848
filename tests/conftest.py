"""Settings of pytest for every test."""

import sys
from collections.abc import Generator

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Give every test one thread.

    The tensors are too small to share: threads that wait for one another cost more than they do. This is a hook and
    not a fixture, because it must run before the fixtures of modules too.
    """
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Keep Python's tracer: pyautoattack switches it off, and with it the coverage of all tests that follow."""
    tracer = sys.gettrace()
    try:
        return (yield)
    finally:
        sys.settrace(tracer)
