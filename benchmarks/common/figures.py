"""Pictures of results."""

from __future__ import annotations

from typing import Any


def make_panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and its panels, side by side; sizes are in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])
