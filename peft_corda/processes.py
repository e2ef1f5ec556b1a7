"""Several processes that calibrate together: sums, shared work, and errors that end all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


class Processes:
    """The processes of `torch.distributed`'s default group, or the only one there is.

    Every process must call the same methods in the same order.
    """

    def __init__(self) -> None:
        running = distributed.is_available() and distributed.is_initialized()
        self.count = distributed.get_world_size() if running else 1
        self.rank = distributed.get_rank() if running else 0
        on_device = running and "nccl" in distributed.get_backend()
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_device else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.count == 1:
            return tensor
        moved = tensor.to(self._device or "cpu").contiguous()
        distributed.all_reduce(moved)
        return moved.to(tensor.device)

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        tensor = torch.tensor([number], device=self._device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return int(tensor)

    def from_owner(self, tensor: Tensor, owner: int) -> Tensor:
        """The owner's tensor; the others give one of the same shape and dtype."""
        if self.count == 1:
            return tensor
        moved = tensor.to(self._device or "cpu").contiguous()
        distributed.broadcast(moved, owner)
        return moved.to(tensor.device)

    def first(self, value: T | None) -> T | None:
        """What the first process has that has anything; it must be on the CPU."""
        if self.count == 1:
            return value
        owner = self.count - self.largest(0 if value is None else self.count - self.rank)
        if owner == self.count:
            return None
        box = [value]
        distributed.broadcast_object_list(box, owner, device=self._device)
        return box[0]

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Which process does each piece of work: the dearest first, to whoever has least to do."""
        load = [0.0] * self.count
        owners = [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
            owners[piece] = load.index(min(load))
            load[owners[piece]] += costs[piece]
        return owners

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for each other at the end; an error in one process is an error in all.

        Raises:
            RuntimeError: in the processes that were well themselves.
        """
        try:
            yield
        except Exception:  # of any kind: the others are told before it goes on its way
            self.largest(self.rank + 1)
            raise
        failed = self.largest(0)
        if failed:
            raise RuntimeError(
                f"Calibration failed in process {failed - 1}, see its own error message. This "
                f"process ({self.rank}) stops with it."
            )

    def wait(self) -> None:
        """Until all processes are here."""
        self.largest(0)
