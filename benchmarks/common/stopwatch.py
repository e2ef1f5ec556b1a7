"""CPU time and wall time."""

from __future__ import annotations

import gc
import time

Seconds = dict[str, float]  # "cpu" and "wall"


class Stopwatch:
    """CPU time of this process (all threads) and wall time since the stopwatch was made."""

    def __init__(self) -> None:
        gc.collect()
        self._start = self._now()

    def read(self) -> Seconds:
        """Seconds since the start."""
        cpu, wall = self._now()
        return {"cpu": cpu - self._start[0], "wall": wall - self._start[1]}

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()
