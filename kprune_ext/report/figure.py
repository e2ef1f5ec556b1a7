"""Pictures of a report, by matplotlib (which the extra ``plots`` installs)."""

from __future__ import annotations

import os
from pathlib import Path

from ..common.files import replacing
from .report import KPruneReport


def save_kept(report: KPruneReport, path: str | os.PathLike[str]) -> None:
    """Write a picture of a report: heads and neurons kept, and the reconstruction error, by layer.

    Args:
        report: what to draw.
        path: the format follows from its ending, PNG without one.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed. Install it with: "
            "pip install 'peft-corda[plots]'"
        ) from error
    # No pyplot: it would choose a backend for the whole process.
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    heads, neurons, errors = figure.subplots(1, 3)
    for panel, kind, name in ((heads, "attention", "heads"), (neurons, "ffn", "neurons")):
        rows = [row for row in report.sublayers if row.kind == kind]
        layers = [row.layer for row in rows]
        panel.bar(layers, [row.units_before for row in rows], color="0.88", label="before")
        panel.bar(layers, [row.units for row in rows], label="kept")
        panel.set(title=f"{name} kept", xlabel="layer")
        panel.legend(fontsize="x-small")
        errors.plot(layers, [_number(row.error) for row in rows], "o-", markersize=3, label=kind)
    errors.set(title="reconstruction error", xlabel="layer", ylim=(0, None))
    errors.legend(fontsize="x-small")
    figure.suptitle(f"K-prune: {report.flops / report.flops_before:.1%} of encoder FLOPs kept")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png", dpi=120)


def _number(error: float | None) -> float:
    return float("nan") if error is None else error
