"""Pictures of a report, by matplotlib (which the extra `plots` installs)."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kprune_ext.common.files import replacing

from .spectra import layer_number

if TYPE_CHECKING:
    from .report import CordaReport

_PANEL_INCHES = (3.6, 2.8)
_MOST_COLUMNS = 4


def save_spectra(report: CordaReport, path: str | os.PathLike[str]) -> None:
    """Write the spectra of a report: a panel for each type of module, a line for each layer.

    Args:
        report: its `spectra` are drawn, and a dot at the rank of each adapter.
        path: the format follows from its ending, PNG without one.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if matplotlib does not know the format.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed. Install it with: "
            "pip install 'peft-corda[plots]'"
        ) from error
    types = [summary.type for summary in report.types]
    columns = min(len(types), _MOST_COLUMNS)
    rows = math.ceil(len(types) / columns)
    # No pyplot: it would choose a backend for the whole process.
    figure = Figure(
        figsize=(columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1]), layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(types) :]:
        panel.remove()
    depths = [layer_number(module.name) or 0 for module in report.modules]
    for kind, panel in zip(types, panels, strict=False):
        _draw(panel, report, kind, max(depths), colormaps["viridis"])
    figure.suptitle(f"CorDA {report.method}: share of the layer's energy, by direction")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png", dpi=120)


def _draw(panel: Any, report: CordaReport, kind: str, deepest: int, colors: Any) -> None:
    members = [module for module in report.modules if module.type == kind]
    for place, module in enumerate(members):
        depth = layer_number(module.name) or 0
        shares = report.spectra[module.name].tolist()
        color = colors(depth / max(deepest, 1))
        # The first and the last layer say how to read the colours.
        label = f"layer {depth}" if place in (0, len(members) - 1) else None
        panel.plot(range(1, len(shares) + 1), shares, color=color, linewidth=1, label=label)
        panel.plot(module.rank, shares[module.rank - 1], "o", color=color, markersize=3)
    if any(bool((report.spectra[module.name] > 0).any()) for module in members):
        panel.set_yscale("log")
    panel.set_title(kind)
    panel.set_xlabel("direction")
    panel.legend(fontsize="x-small")
