"""Measured latencies of sub-layers of different sizes."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.writing import write_json

LATENCY_FORMAT = 1


@dataclass(frozen=True)
class LatencyTable:
    """Measured latency of one attention and one feed-forward sub-layer of different sizes.

    Attributes:
        device: Name of the device on which it was measured.
        batch_size, sequence_length: Shape of the input.
        heads, neurons: Seconds by number of units kept, from none to all.
    """

    device: str
    batch_size: int
    sequence_length: int
    heads: Mapping[int, float]
    neurons: Mapping[int, float]

    def costs(self, kind: str, units: int) -> Tensor:
        """Seconds of a sub-layer with 0, 1, …, `units` units, interpolated between measured sizes.

        Args:
            kind: `"attention"` or `"ffn"`.
            units: The largest number of units.

        Returns:
            `(units + 1,)` in float64, not decreasing.

        Raises:
            ValueError: If the table does not cover 0 to `units` units.
        """
        points = sorted((self.heads if kind == "attention" else self.neurons).items())
        if not points or points[0][0] > 0 or points[-1][0] < units:
            raise ValueError(
                f"The latency table has no entries from 0 to {units} units for the kind {kind!r}. "
                "Measure it on this model with kprune_ext.measure_latency."
            )
        sizes = torch.arange(units + 1, dtype=torch.float64)
        known = torch.tensor([size for size, _ in points], dtype=torch.float64)
        values = torch.tensor([seconds for _, seconds in points], dtype=torch.float64)
        values = values.cummax(0).values
        right = torch.searchsorted(known, sizes).clamp(1, len(known) - 1)
        left = right - 1
        share = (sizes - known[left]) / (known[right] - known[left])
        return values[left] + share * (values[right] - values[left])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON; the file appears only when it is complete."""
        write_json(path, {"format": LATENCY_FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Reads a file that `save` wrote.

        Raises:
            ValueError: If the file is not a latency table.
            OSError: If the file cannot be read.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            values: dict[str, Any] = json.loads(text)
            if values.pop("format") != LATENCY_FORMAT:
                raise ValueError("its format is unknown")
            for kind in ("heads", "neurons"):
                values[kind] = {int(size): float(time) for size, time in values[kind].items()}
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is not a latency table ({error}). Pass a file that "
                "LatencyTable.save wrote, or measure a new one with kprune_ext.measure_latency."
            ) from None


def sizes_to_measure(units: int, points: int = 9) -> list[int]:
    """Evenly spaced numbers of units, from none to all."""
    count = min(points, units + 1)
    return sorted({round(units * step / max(count - 1, 1)) for step in range(count)})


def median_seconds(
    runs: Sequence[Callable[[], Any]], rounds: int, synchronize: Callable[[], None]
) -> list[float]:
    """Median time of each function; they take turns, so that all see the same disturbances.

    Args:
        runs: Functions to time; each is called once beforehand to warm up.
        rounds: Number of times that each is timed.
        synchronize: Function that waits until the device has finished.

    Returns:
        Seconds per function.
    """
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, measured in zip(runs, times, strict=True):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            measured.append(time.perf_counter() - start)
    return [statistics.median(measured) for measured in times]
