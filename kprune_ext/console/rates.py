"""How fast this machine computes, measured in a fraction of a second, for plans in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# Rows and columns of the matrices: tokens of a batch, and the width of a model.
_TOKENS, _WIDTH = 2048, 768
_SECONDS = 0.3


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOPs per second of matrix products like those of a model's layers.

    Args:
        device: Device that computes them.
        dtype: Dtype of the matrices.
    """
    left = torch.ones(_TOKENS, _WIDTH, device=device, dtype=dtype)
    right = torch.ones(_WIDTH, _WIDTH, device=device, dtype=dtype)
    seconds = seconds_per_call(lambda: left @ right, device)
    return 2.0 * _TOKENS * _WIDTH**2 / seconds


def seconds_per_call(function: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds that a call takes, by the fastest of the calls within a fraction of a second.

    Args:
        function: Called at least twice; the first call does not count.
        device: Device whose work is waited for.
    """
    ends = time.perf_counter() + _SECONDS
    _timed(function, device)
    best = _timed(function, device)
    while time.perf_counter() < ends:
        best = min(best, _timed(function, device))
    return best


def duration(seconds: float) -> str:
    """Returns a duration in words, such as "about 3 minutes"."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:,.0f} {unit}"
    return "a second or less" if seconds < 1.5 else f"about {seconds:.0f} seconds"


def _timed(function: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
