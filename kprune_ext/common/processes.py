"""Several processes at one piece of work: sums, shared work, and errors that end all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

T = TypeVar("T")


class Processes:
    """The processes of `torch.distributed`'s default group, or the only one there is.

    Every process must call the same methods in the same order.

    Args:
        in_step: whether a run of the model is work of all processes together, as weights are gathered
            from all of them: then all must run it equally often.
        alone: whether this process works by itself, whatever others there are.
    """

    def __init__(self, collective_forward: bool = False, alone: bool = False) -> None:
        running = not alone and distributed.is_available() and distributed.is_initialized()
        self.count = distributed.get_world_size() if running else 1
        self.rank = distributed.get_rank() if running else 0
        on_device = running and "nccl" in distributed.get_backend()
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_device else None
        self.collective_forward = collective_forward and self.count > 1
        self._notes = Notes() if self.collective_forward else None
        self._known: Exception | None = None  # that all processes have been told of

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.count == 1:
            return tensor
        moved = tensor.to(self._device or "cpu").contiguous()
        with self._in_contact():
            distributed.all_reduce(moved)
        return moved.to(tensor.device)

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        tensor = torch.tensor([number], device=self._device)
        with self._in_contact():
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return int(tensor)

    def from_owner(self, tensor: Tensor, owner: int) -> Tensor:
        """The owner's tensor; the others give one of the same shape and dtype."""
        if self.count == 1:
            return tensor
        moved = tensor.to(self._device or "cpu").contiguous()
        with self._in_contact():
            distributed.broadcast(moved, owner)
        return moved.to(tensor.device)

    def first(self, value: T | None) -> T | None:
        """What the first process has that has anything; it must be on the CPU."""
        if self.count == 1:
            return value
        owner = self.count - self.largest(0 if value is None else self.count - self.rank)
        if owner == self.count:
            return None
        return self._object_from(value, owner)

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank; they must be on the CPU."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with self._in_contact():
            distributed.all_gather_object(found, value)
        return found

    def rounds(self, owners: Sequence[int]) -> list[list[int]]:
        """Pieces of work in an order in which every process has one of each round to do at most."""
        waiting: list[list[int]] = [[] for _ in range(self.count)]
        for piece, owner in enumerate(owners):
            waiting[owner].append(piece)
        return [
            [own[number] for own in waiting if number < len(own)]
            for number in range(max(map(len, waiting)))
        ]

    def items(self, source: Iterable[T]) -> Iterator[T | None]:
        """The items of an iterable; in step, None after their end until no process has any left."""
        if not self.collective_forward:
            yield from source
            return
        iterator, end = iter(source), object()
        while True:
            with self.error_barrier():
                item = next(iterator, end)
            if not self.largest(int(item is not end)):
                return
            yield None if item is end else cast(T, item)

    @contextmanager
    def error_barrier(self, running_model: bool = False) -> Iterator[None]:
        """Wait for each other at the end; an error in one process is an error in all.

        Args:
            running_model: whether the model is run in this block. If it is run in step, an error leaves
                the others waiting in the middle of it: they are left a note, which they find when
                this process has gone, or their patience is at its end.

        Raises:
            RuntimeError: in the processes that were well themselves.
        """
        unseen = running_model and self.collective_forward
        try:
            yield
        except Exception as error:  # of any kind: the others are told before it goes on its way
            if error is self._known:
                raise
            if unseen and self._notes is not None:
                writer, text = self._notes.leave(self.rank, _in_words(error))
                if writer != self.rank:
                    raise RuntimeError(self._failed(writer, text)) from error
            elif self.count > 1:
                with suppress(RuntimeError):  # the others may be gone: this error comes first
                    self._object_from(_in_words(error), self.largest(self.rank + 1) - 1)
            self._known = error
            raise
        failed = self.largest(0)
        if failed:
            text = self._object_from("", failed - 1)
            self._known = RuntimeError(self._failed(failed - 1, text))
            raise self._known

    def _failed(self, process: int, text: str) -> str:
        return (
            f"Process {process} failed, and this process ({self.rank}) stops with it. The error there "
            f"was: {text}"
        )

    def _object_from(self, value: T, owner: int) -> T:
        box = [value]
        with self._in_contact():
            distributed.broadcast_object_list(box, owner, device=self._device)
        return box[0]

    @contextmanager
    def _in_contact(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            note = self._notes.read() if self._notes is not None else None
            if note is not None and note[0] != self.rank:
                raise RuntimeError(self._failed(*note)) from error
            raise RuntimeError(
                f"Process {self.rank} of {self.count} lost contact with another process: it "
                "has ended (killed, or out of memory; see its own output), or was not "
                "there in time. If it only has more to do, allow more time: "
                "init_process_group(timeout=...), or Accelerator(kwargs_handlers="
                "[InitProcessGroupKwargs(timeout=...)])."
            ) from error


class Notes:
    """Where a process writes why it ends, when the others are in the middle of something."""

    _numbers = count()

    def __init__(self) -> None:
        # One for each piece of work: all processes begin equally many.
        self._key = f"failed/{next(self._numbers)}"
        try:
            from torch.distributed.distributed_c10d import _get_default_store

            self._store: Any = _get_default_store()
        except (ImportError, ValueError):  # then there is only the loss of contact to go by
            self._store = None

    def leave(self, rank: int, text: str) -> tuple[int, str]:
        """Write a note, unless there is one; returns the rank and text of the one that is there."""
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.compare_set(self._key, "", json.dumps([rank, text]))
        return self.read() or (rank, text)

    def read(self) -> tuple[int, str] | None:
        if self._store is None:
            return None
        with suppress(RuntimeError):
            if self._store.check([self._key]):
                rank, text = json.loads(self._store.get(self._key))
                return rank, text
        return None


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
