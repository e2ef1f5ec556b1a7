"""Giving memory that is no longer needed back to the system, and keeping it in one piece."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import (
    convert_file_size_to_int,
)
from torch import nn


def trim_memory() -> None:
    """Return freed memory to the system, where the C library can be asked to (Linux, glibc).

    Where large matrices of many sizes come and go, what glibc keeps of them for later grows to several
    times of what is in use.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library
        return
    trim(0)


@contextmanager
def without_onednn(model: nn.Module) -> Iterator[None]:
    """Run a model of full precision on the CPU without oneDNN, where inputs have many shapes.

    oneDNN keeps what it compiles for every shape, PyTorch asks it for GELU, and thousands of such small
    blocks between the large ones that come and go hinder the C library from putting those together
    again: memory in pieces then grows to several times of what is in use. Products of matrices in
    float32 are not oneDNN's matter, but those in lower precision are, and slow without it; then, and
    where PyTorch's flags are frozen, everything stays as it is.

    The flag is the process's: other threads run without oneDNN in the meantime, too.
    """
    own = {p.dtype for p in model.parameters() if p.device.type == "cpu" and p.is_floating_point()}
    backend: Any = torch.backends.mkldnn
    if not own or own - {torch.float32, torch.float64} or torch.backends.flags_frozen():
        yield
        return
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before


def bytes_of(name: str, value: int | str) -> int:
    """A size in bytes.

    Args:
        name: Of the option, for the message.
        value: Number of bytes, or a text such as `"500MB"` or `"4GiB"`.

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
    """`max_memory` as a number of bytes; None where there is no limit.

    Raises:
        ValueError: If it is not a valid size.
    """
    return None if max_memory is None else bytes_of("max_memory", max_memory)
