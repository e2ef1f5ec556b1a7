"""Several processes that work on one task: sums, shared work, and an error barrier."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

T = TypeVar("T")
# Longer values are not shown where processes differ.
_SHOWN = 60


class Processes:
    """The processes of `torch.distributed`'s default group, or this process alone without one.

    Every process must call the same methods in the same order.

    Args:
        collective_forward: Whether a forward pass is a collective of all processes, because it gathers
            sharded weights from them: then all must run it equally often.
        alone: Whether this process works by itself, even if others are running.
    """

    def __init__(self, collective_forward: bool = False, alone: bool = False) -> None:
        running = not alone and distributed.is_available() and distributed.is_initialized()
        self.count = distributed.get_world_size() if running else 1
        self.rank = distributed.get_rank() if running else 0
        on_device = running and "nccl" in distributed.get_backend()
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_device else None
        self.collective_forward = collective_forward and self.count > 1
        self._notes = Notes() if self.count > 1 else None
        self._known: Exception | None = None  # an error that all processes know of

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over the processes."""
        if self.count == 1:
            return tensor
        moved = tensor.to(self._device or "cpu").contiguous()
        with self._in_contact():
            distributed.all_reduce(moved)
        return moved.to(tensor.device)

    def largest(self, number: int) -> int:
        """Returns the largest of the processes' numbers."""
        if self.count == 1:
            return number
        tensor = torch.tensor([number], device=self._device)
        with self._in_contact():
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return int(tensor)

    def from_owner(self, tensor: Tensor, owner: int) -> Tensor:
        """Returns the owner's tensor; the others pass one of the same shape and dtype."""
        if self.count == 1:
            return tensor
        moved = tensor.to(self._device or "cpu").contiguous()
        with self._in_contact():
            distributed.broadcast(moved, owner)
        return moved.to(tensor.device)

    def first(self, value: T | None) -> T | None:
        """Returns the first value that is not None, by rank; values must be on the CPU."""
        if self.count == 1:
            return value
        owner = self.count - self.largest(0 if value is None else self.count - self.rank)
        if owner == self.count:
            return None
        return self._object_from(value, owner)

    def gather(self, value: T) -> list[T]:
        """Returns every process's value, by rank; values must be on the CPU."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with self._in_contact():
            distributed.all_gather_object(found, value)
        return found

    def require_agreement(self, settings: Mapping[str, Any], but: str = "the data") -> None:
        """Checks that all processes were given the same, before they work on it together.

        Args:
            settings: What has to be the same, by the name that a message calls it; JSON-ready values.
            but: What may differ, for the message.

        Raises:
            ValueError: In all processes, if something differs; the message names it.
        """
        texts = {name: json.dumps(value, default=str) for name, value in settings.items()}
        found = _difference(self.gather(texts))
        if found is not None:
            self._known = ValueError(
                f"The processes were given different work: {found}. Call this in every process with "
                f"the same model, config and options; only {but} may differ."
            )
            raise self._known

    @contextmanager
    def leaving_a_note(self) -> Iterator[None]:
        """Tells the other processes of an error that they cannot be told of at an error barrier.

        They find the note when they have lost contact with this process.
        """
        try:
            yield
        except Exception as error:  # of any kind: the others are told before it is raised
            if error is not self._known and self._notes is not None:
                self._notes.leave(self.rank, _in_words(error))
            raise

    def rounds(self, owners: Sequence[int]) -> list[list[int]]:
        """Groups pieces of work into rounds in which every process has at most one piece.

        Args:
            owners: Rank of the process that does each piece.

        Returns:
            Per round, the numbers of its pieces.
        """
        waiting: list[list[int]] = [[] for _ in range(self.count)]
        for piece, owner in enumerate(owners):
            waiting[owner].append(piece)
        return [
            [own[number] for own in waiting if number < len(own)]
            for number in range(max(map(len, waiting)))
        ]

    def items(self, source: Iterable[T]) -> Iterator[T | None]:
        """Yields the items of an iterable.

        With a collective forward, None follows them until no process has any left.
        """
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
        """Waits for all processes at the end of the block; an error in one is raised in all.

        Args:
            running_model: Whether the model is run in this block. If its forward is collective, an error
                leaves the others waiting in the middle of it. This process then leaves a note, which
                they find when it has ended or when they time out.

        Raises:
            RuntimeError: In the processes in which the block itself did not fail.
        """
        unseen = running_model and self.collective_forward
        try:
            yield
        except Exception as error:  # of any kind: the others are told before it is raised
            if error is self._known:
                raise
            if unseen and self._notes is not None:
                writer, text = self._notes.leave(self.rank, _in_words(error))
                if writer != self.rank:
                    raise RuntimeError(self._failed(writer, text)) from error
            elif self.count > 1:
                with suppress(RuntimeError):  # the others may have ended; this error matters more
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
                "has ended (killed, or out of memory; see its own output), or did not "
                "respond in time. If it only needs longer, raise the timeout: "
                "init_process_group(timeout=...), or Accelerator(kwargs_handlers="
                "[InitProcessGroupKwargs(timeout=...)])."
            ) from error


class Notes:
    """Notes of why a process fails while the others wait in a collective forward."""

    _numbers = count()

    def __init__(self) -> None:
        # One key per `Processes` object, of which every process creates equally many.
        self._key = f"failed/{next(self._numbers)}"
        try:
            from torch.distributed.distributed_c10d import _get_default_store

            self._store: Any = _get_default_store()
        except (ImportError, ValueError):  # then a failure shows only as lost contact
            self._store = None

    def leave(self, rank: int, text: str) -> tuple[int, str]:
        """Writes a note unless one exists, and returns the rank and text of the one that exists."""
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


def _difference(every: Sequence[Mapping[str, str]]) -> str | None:
    """Says in which settings the first process and another differ; None if they do not."""
    for rank, other in enumerate(every):
        parts = []
        for name, value in every[0].items():
            if value == other.get(name):
                continue
            if len(value) <= _SHOWN and len(other.get(name, "")) <= _SHOWN:
                parts.append(f"{name} ({value} in process 0, {other.get(name)} in process {rank})")
            else:
                parts.append(name)
        if parts:
            return f"processes 0 and {rank} differ in {', '.join(parts)}"
    return None


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
