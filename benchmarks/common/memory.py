"""The memory that this process has in use, and its peak; mostly for Linux only."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

MIB = 2**20
STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (the peak so far)."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def peak_bytes() -> int:
    """The peak so far; elsewhere than on Linux it includes that of the process it was forked from."""
    if STATUS.exists():
        return resident("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def settle() -> int:
    """Return freed memory to the system, forget the peak so far, and say how much is left in use.

    Otherwise memory that loading the model has freed would be used again without being seen.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")
    before, peak = resident("VmRSS"), resident("VmHWM")
    if peak > before + 16 * MIB:
        raise RuntimeError("the kernel did not reset the peak of memory in use")
    return before
