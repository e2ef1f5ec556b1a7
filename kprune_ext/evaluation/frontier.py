"""A model and its pruned copies of several sizes: scores, latencies, a table and a figure of them."""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..files.presentation import COLOURS, empty_figure, markdown_table, save_figure


@dataclass(frozen=True)
class Point:
    """A pruned copy, or why there is none.

    Attributes:
        reduction: Fraction that was to be removed.
        folder: Name of the folder with the copy; empty if there is none.
        score: Its score; None if there is none.
        cost: Fraction of the pruned quantity (FLOPs, parameters, latency) that it has.
        parameters: Number of its parameters.
        seconds, dense_seconds: Seconds per batch of the copy, and of the model in turns with it.
        note: Why there is no copy.
    """

    reduction: float
    folder: str = ""
    score: float | None = None
    cost: float | None = None
    parameters: int | None = None
    seconds: float | None = None
    dense_seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Frontier:
    """A model's score, and those of its pruned copies against their latency.

    Attributes:
        metric: Name of the score.
        score: The model's own score.
        parameters: Number of its parameters.
        shape: What latency was measured on, in words.
        points: The copies, by what is removed from them.
    """

    metric: str
    score: float
    parameters: int
    shape: str = ""
    points: tuple[Point, ...] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Frontier:
        """Returns the frontier from a dict that `to_dict` made.

        Raises:
            KeyError, TypeError: If a field is missing or unknown.
        """
        points = tuple(Point(**point) for point in values["points"])
        return cls(**values | {"points": points})

    def to_dict(self) -> dict[str, Any]:
        """Returns the frontier as plain values."""
        return asdict(self)

    def with_point(self, point: Point) -> Frontier:
        """Returns the frontier with another copy, in place of one with the same reduction."""
        others = [one for one in self.points if one.reduction != point.reduction]
        return replace(self, points=tuple(sorted([*others, point], key=lambda one: one.reduction)))

    @property
    def dense_seconds(self) -> float | None:
        """Median of the model's seconds per batch; None if it was not measured."""
        found = [one.dense_seconds for one in self.points if one.dense_seconds is not None]
        return statistics.median(found) if found else None

    def markdown(self) -> str:
        """Returns a table with a row for the model, and for each copy."""
        dense = self.dense_seconds
        rows = [
            [
                "–",
                f"{self.score:.4g}",
                "100.0%",
                "–" if dense is None else f"{1000 * dense:.2f}",
                "–" if dense is None else "1.00×",
                "100.0%",
                f"{self.parameters:,}",
            ]
        ]
        rows += [self._row(point) for point in self.points]
        head = ("removed", self.metric, "of the model's", "ms", "speed-up", "left", "parameters")
        notes = [f"{one.reduction:.4g}: {one.note}." for one in self.points if one.note]
        below = [f"Latency is that of {self.shape}."] if self.shape else []
        return "\n\n".join([markdown_table(head, rows), *below, *notes]) + "\n"

    def _row(self, point: Point) -> list[str]:
        if point.score is None or not point.seconds or not point.dense_seconds:
            return [f"{100 * point.reduction:g}%", *["–"] * 6]
        return [
            f"{100 * point.reduction:g}%",
            f"{point.score:.4g}",
            f"{point.score / self.score:.1%}" if self.score else "–",
            f"{1000 * point.seconds:.2f}",
            f"{point.dense_seconds / point.seconds:.2f}×",
            f"{point.cost:.1%}",
            f"{point.parameters:,}",
        ]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a figure of score against latency.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If it does not know the format that the ending of `path` names.
        """
        figure = empty_figure(6, 4)
        panel = figure.subplots()
        points = [one for one in self.points if one.score is not None and one.seconds is not None]
        found = [(1000 * (one.seconds or 0.0), one.score or 0.0) for one in points]
        if self.dense_seconds is not None:
            found = [(1000 * self.dense_seconds, self.score), *found]
        panel.plot(*zip(*found, strict=True), color=COLOURS["blue"], marker="o")
        panel.plot(*found[0], color=COLOURS["black"], marker="*", markersize=12)
        names = ["the model", *(f"{100 * one.reduction:g} % removed" for one in points)]
        for name, place in zip(names, found, strict=True):
            panel.annotate(name, place, xytext=(6, -12), textcoords="offset points", fontsize=9)
        panel.margins(x=0.2, y=0.15)
        panel.grid(color="0.92")
        panel.set(xlabel=f"ms for {self.shape}", ylabel=self.metric)
        save_figure(figure, path)
