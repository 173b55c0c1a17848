"""The machine that a result comes from."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor() -> str:
    """Return the name of the processor and the vector instructions that torch uses on it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")  # Linux; there `platform.processor` is often empty
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
