"""Trimming freed memory, avoiding its fragmentation, and sizes in bytes."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import (
    convert_file_size_to_int,
)
from torch import nn


def trim_memory() -> None:
    """Returns freed memory to the system, where the C library can do so (Linux, glibc).

    While large matrices of many sizes are allocated and freed, the memory that glibc retains grows to
    several times the memory in use.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library
        return
    trim(0)


def free_memory(device: torch.device) -> int | None:
    """Returns the free bytes of a GPU, with those that PyTorch holds in reserve.

    For a CPU, and for a GPU that this machine does not have, it is None.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + held)


def available_memory(device: torch.device) -> int:
    """Returns the bytes that are free on a device: of a GPU, or of this machine or container."""
    on_gpu = free_memory(device)
    if on_gpu is not None:
        return on_gpu
    found = int(psutil.virtual_memory().available)
    try:  # what a container may take, which psutil does not know
        limit, used = (
            int(Path("/sys/fs/cgroup", name).read_text())
            for name in ("memory.max", "memory.current")
        )
    except (OSError, ValueError):
        return found
    return max(0, min(found, limit - used))


@contextmanager
def without_onednn(model: nn.Module) -> Iterator[None]:
    """Runs a full-precision model on the CPU without oneDNN, for inputs of many shapes.

    oneDNN caches a compiled kernel for every shape, and PyTorch uses it for GELU. Thousands of these
    small blocks between large ones that are allocated and freed keep the C library from merging the
    freed memory, and the fragmented memory grows to several times the memory in use. Matrix products
    in float32 do not use oneDNN, but those in lower precision do, and are slow without it: for models
    with such parameters, and where PyTorch's flags are frozen, nothing is changed.

    The flag holds for the process: other threads run without oneDNN in the meantime, too. It is put
    back when the last of several such blocks ends.
    """
    own = {p.dtype for p in model.parameters() if p.device.type == "cpu" and p.is_floating_point()}
    backend: Any = torch.backends.mkldnn
    if not own or own - {torch.float32, torch.float64} or torch.backends.flags_frozen():
        yield
        return
    _blocks.enter(backend)
    try:
        yield
    finally:
        _blocks.leave(backend)


@contextmanager
def with_onednn() -> Iterator[None]:
    """Runs as outside of every block of `without_onednn`, for measurements in one."""
    if torch.backends.flags_frozen() or not _blocks.count:
        yield
        return
    backend: Any = torch.backends.mkldnn
    now, backend.enabled = backend.enabled, _blocks.before
    try:
        yield
    finally:
        backend.enabled = now


class _Blocks:
    """Counts the blocks of all threads that run without oneDNN."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0
        self.before = True

    def enter(self, backend: Any) -> None:
        with self._lock:
            if self.count == 0:
                self.before = backend.enabled
                backend.enabled = False
            self.count += 1

    def leave(self, backend: Any) -> None:
        with self._lock:
            self.count -= 1
            if self.count == 0:
                backend.enabled = self.before


_blocks = _Blocks()


def bytes_of(name: str, value: int | str) -> int:
    """Converts a size to a number of bytes.

    Args:
        name: Name of the option, for the message.
        value: The number of bytes, or a text such as `"500MB"` or `"4GiB"`.

    Raises:
        ValueError: If the value is not a valid size.
    """
    try:
        return int(convert_file_size_to_int("" if isinstance(value, bool) else value))
    except (ValueError, TypeError, OverflowError, AttributeError):
        raise ValueError(
            f"{name}={value!r} is not a valid size. Pass a whole number of bytes of at least 0, or a "
            "text such as '500MB' or '4GiB'."
        ) from None


def bytes_of_limit(max_memory: int | str | None) -> int | None:
    """Converts `max_memory` to a number of bytes; None stands for no limit.

    Raises:
        ValueError: If the value is not a valid size.
    """
    return None if max_memory is None else bytes_of("max_memory", max_memory)
