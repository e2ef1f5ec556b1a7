"""Memory for hidden states, which spills to files beyond a limit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


class StateMemory:
    """Memory for hidden states: up to a limit on the device that computes them, beyond it in files.

    Args:
        limit: Largest number of bytes in memory.
        folder: Existing folder for the files.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit = limit
        self.used = 0
        self.spilled = 0
        self._folder = folder

    def hold(self, values: Tensor) -> Tensor:
        """Returns a copy of the values, in memory and counted, or mapped from a file."""
        size = values.numel() * values.element_size()
        if self.used + size <= self.limit:
            self.used += size
            return values.clone()
        path = self._folder / str(self.spilled)
        self.spilled += size
        held = torch.from_file(str(path), shared=True, size=values.numel(), dtype=values.dtype)
        return held.view(values.shape).copy_(values)


@contextmanager
def state_memory(limit: int) -> Iterator[StateMemory]:
    """Gives memory for hidden states, whose files are removed when the block ends."""
    with tempfile.TemporaryDirectory(prefix="kprune-") as folder:
        yield StateMemory(limit, Path(folder))
