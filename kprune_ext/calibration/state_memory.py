"""Memory for hidden states, which spills to files beyond a limit."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.memory import free_memory

_CHUNK = 2**20
# Errors of file systems that cannot allocate a file's blocks in advance.
_CANNOT_ALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


#: Tokens per batch: on a CPU, and at most on a GPU, whose kernels are slow to start.
_CPU_BATCH, _GPU_BATCH = 2048, 16384


def batch_tokens_on(device: torch.device, model: Any) -> int:
    """Returns the number of tokens per batch of a forward pass.

    Args:
        device: Device that the model is on.
        model: The model. On a GPU, a batch's hidden states after every sub-layer take at most a
            sixteenth of the free memory.
    """
    free = free_memory(device)
    if free is None:
        return _CPU_BATCH
    states = 2 * model.config.num_hidden_layers + 16
    bytes_per_token = states * model.config.hidden_size * model.dtype.itemsize
    return max(_CPU_BATCH, min(_GPU_BATCH, free // 16 // bytes_per_token))


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
        """Returns a copy of the values, in memory and counted, or mapped from a file.

        Raises:
            OSError: If the folder of the files has no room for them.
        """
        size = values.numel() * values.element_size()
        if self.used + size <= self.limit or not size:
            self.used += size
            return values.clone()
        path = self._folder / str(self.spilled)
        try:
            _allocate(path, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise self._no_room(size, error) from error
        self.spilled += size
        held = torch.from_file(str(path), shared=True, size=values.numel(), dtype=values.dtype)
        with suppress(OSError):  # not while it is mapped, on Windows
            path.unlink()  # it lives as long as the tensor, and does not outlive the process
        return held.view(values.shape).copy_(values)

    def _no_room(self, size: int, error: OSError) -> OSError:
        return OSError(
            error.errno,
            f"Hidden states beyond max_state_memory ({self.limit:,} bytes) are kept in temporary "
            f"files, but {self._folder.parent} has no room for {size:,} bytes more; "
            f"{self.spilled:,} bytes are there already ({error.strerror}). Set the environment "
            "variable TMPDIR to a folder with more room, raise max_state_memory, or lower max_tokens",
        )


def _allocate(path: Path, size: int) -> None:
    """Creates a file whose blocks are all there: to write to a mapped one without ends the process."""
    with open(path, "xb") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in _CANNOT_ALLOCATE:
                    raise
        zeros = bytes(min(size, _CHUNK))
        for start in range(0, size, _CHUNK):
            file.write(zeros[: size - start])


@contextmanager
def state_memory(limit: int) -> Iterator[StateMemory]:
    """Gives memory for hidden states, whose files are removed when the block ends."""
    with tempfile.TemporaryDirectory(prefix="kprune-") as folder:
        yield StateMemory(limit, Path(folder))
