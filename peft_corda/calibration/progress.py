"""One progress bar over all of a calibration's passes, with the time left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate.utils import tqdm

T = TypeVar("T")
_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
_OPEN_FORMAT = "{desc} {n_fmt} [{elapsed}{postfix}]"
_BATCHES, _LAYERS = "batches", "layers"


class Progress:
    """A bar that counts batches and decomposed groups of layers.

    The two take different times, so the time left is that of what is left of each, at its mean time so
    far. Until both have been timed it is a lower bound.

    Args:
        batches: Batches per pass; None if nobody knows, until the first pass has ended.
        groups: Number of groups of layers of each pass.
    """

    def __init__(self, batches: int | None, groups: Sequence[int]) -> None:
        self._batches, self._groups = batches, groups
        self._done = {_BATCHES: 0, _LAYERS: 0}
        self._spent = {_BATCHES: 0.0, _LAYERS: 0.0}
        self._timed = {_BATCHES: 0, _LAYERS: 0}
        self._since = time.monotonic()
        self._bar: Any = tqdm(total=self._total(), desc="Calibrating")
        self._show()

    def begin(self, number: int) -> None:
        """Names the pass that begins, by its number from 0."""
        if len(self._groups) > 1:
            self._bar.set_description_str(f"Calibrating, pass {number + 1} of {len(self._groups)}")

    def skip(self, number: int) -> None:
        """Counts a pass that an earlier run has finished."""
        self._step(_BATCHES, self._batches or 0)
        self._step(_LAYERS, self._groups[number])

    def over(self, batches: Iterable[T], resumed: int = 0) -> Iterator[T]:
        """Yields batches and counts them.

        Args:
            batches: The batches of a pass.
            resumed: Number of batches that an earlier run has summed, which take no time.
        """
        self._since = time.monotonic()
        for number, batch in enumerate(batches):
            yield batch
            self._step(_BATCHES, 1, timed=number >= resumed)
        self._since = time.monotonic()

    def start_decomposing(self) -> None:
        """Begins to time decompositions; all batches of the pass have been counted."""
        if self._batches is None:
            self._batches = self._done[_BATCHES]
        self._since = time.monotonic()

    def decomposed(self) -> None:
        """Counts a group of layers."""
        self._step(_LAYERS, 1, timed=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()

    def left(self) -> tuple[float, bool]:
        """Returns the seconds left, and whether all kinds of work have been timed."""
        wanted = {
            _BATCHES: len(self._groups) * (self._batches or 0),
            _LAYERS: sum(self._groups),
        }
        seconds, is_known = 0.0, self._batches is not None
        for kind, all_of_it in wanted.items():
            missing = max(0, all_of_it - self._done[kind])
            if self._timed[kind]:
                seconds += missing * self._spent[kind] / self._timed[kind]
            elif missing:
                is_known = False
        return seconds, is_known

    def _step(self, kind: str, count: int, *, timed: bool = False) -> None:
        now = time.monotonic()
        if timed:
            self._spent[kind] += now - self._since
            self._timed[kind] += count
        self._since = now
        self._done[kind] += count
        self._show()
        self._bar.update(count)

    def _show(self) -> None:
        total = self._total()
        self._bar.total = total
        self._bar.bar_format = _FORMAT if total else _OPEN_FORMAT
        seconds, is_known = self.left()
        if seconds or is_known:
            text = f"{'' if is_known else '> '}{_clock(seconds)} left"
            self._bar.set_postfix_str(text, refresh=False)

    def _total(self) -> int | None:
        if self._batches is None:
            return None
        return len(self._groups) * self._batches + sum(self._groups)


@contextmanager
def shown_progress(
    shows: bool, batches: int | None, groups: Sequence[int]
) -> Iterator[Progress | None]:
    """Shows a bar while the block runs; yields None if none is wanted."""
    bar = Progress(batches, groups) if shows else None
    try:
        yield bar
    finally:
        if bar is not None:
            bar.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
