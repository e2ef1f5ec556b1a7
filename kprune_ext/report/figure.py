"""Figures of a report, with matplotlib (which the extra `plots` installs)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..files.presentation import COLOURS, empty_figure, save_figure
from .rows import SubLayerReport


def save_kept(
    sublayers: Sequence[SubLayerReport], share: float, path: str | os.PathLike[str]
) -> None:
    """Writes a figure of the units kept, and of the reconstruction error, by layer.

    Args:
        sublayers: The rows of a report.
        share: Fraction of the FLOPs of all sub-layers that is kept.
        path: File to write; its extension sets the format, PNG without one.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib does not know the format.
    """
    figure = empty_figure(11, 3.4)
    heads, neurons, errors = figure.subplots(1, 3)
    for panel, kind, marker, colour in (
        (heads, "attention", "o", COLOURS["blue"]),
        (neurons, "ffn", "s", COLOURS["vermillion"]),
    ):
        rows = [row for row in sublayers if row.kind == kind]
        layers = [row.layer for row in rows]
        panel.bar(layers, [row.units_before for row in rows], color="0.88", label="before")
        panel.bar(layers, [row.units for row in rows], color=colour, label="kept")
        panel.set(title=f"{rows[0].unit if rows else kind} kept", xlabel="layer")
        panel.legend(fontsize="x-small")
        values = [_number(row.error) for row in rows]
        errors.plot(layers, values, marker=marker, markersize=4, color=colour, label=kind)
    errors.set(title="reconstruction error", xlabel="layer", ylim=(0, None))
    errors.legend(fontsize="x-small")
    figure.suptitle(f"K-prune: {share:.1%} of the layers' FLOPs kept")
    save_figure(figure, path)


def _number(error: float | None) -> float:
    return float("nan") if error is None else error
