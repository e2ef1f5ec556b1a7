"""Giving memory that is no longer needed back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system, where the C library can be asked to (Linux, glibc).

    Calibration frees large matrices of many sizes; what glibc keeps of them for later grows to several
    times of what is in use.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library
        return
    trim(0)
