"""Runs a function in a forked process."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


class forked:
    """A process that runs a function; calling it waits, and gives the result or error as a text."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            torch.set_num_threads(1)  # a fork has lost the threads that computed before
            try:
                text = str(work())
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(write, text.encode())
            os._exit(0)
        os.close(write)

    def __call__(self) -> str:
        os.waitpid(self.pid, 0)
        with os.fdopen(self._read) as pipe:
            return pipe.read()
