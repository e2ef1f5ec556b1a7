"""Figures of a report, drawn by matplotlib (which the extra `plots` installs)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kprune_ext.files.presentation import COLOURS, empty_figure, save_figure

from .rows import ModuleReport
from .spectra import layer_number

_PANEL_INCHES = (3.6, 2.8)
_MOST_COLUMNS = 4


def save_spectra(
    method: str,
    modules: Sequence[ModuleReport],
    spectra: Mapping[str, Tensor],
    path: str | os.PathLike[str],
) -> None:
    """Save a figure of the spectra, with a panel per type of module and a line per layer.

    Args:
        method: `"kpm"` or `"ipm"`.
        modules: Rows of the report.
        spectra: Share of the layer's energy in each direction, `(rank,)`, by module name.
        path: File to write. Its ending determines the format, which is PNG without one.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib does not know the format.
    """
    types = list(dict.fromkeys(module.type for module in modules))
    columns = min(len(types), _MOST_COLUMNS)
    rows = math.ceil(len(types) / columns)
    figure = empty_figure(columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1])
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(types) :]:
        panel.remove()
    deepest = max(layer_number(module.name) or 0 for module in modules)
    for kind, panel in zip(types, panels, strict=False):
        members = [module for module in modules if module.type == kind]
        _draw(panel, kind, members, spectra, deepest)
    figure.suptitle(f"CorDA {method}: share of the layer's energy, by direction")
    save_figure(figure, path)


def _draw(
    panel: Any,
    kind: str,
    members: Sequence[ModuleReport],
    spectra: Mapping[str, Tensor],
    deepest: int,
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    first_to_last = [COLOURS["blue"], COLOURS["sky blue"], COLOURS["orange"]]
    colours = LinearSegmentedColormap.from_list("layers", first_to_last)
    for place, module in enumerate(members):
        depth = layer_number(module.name) or 0
        shares = spectra[module.name].tolist()
        color = colours(depth / max(deepest, 1))
        # Labels of the first and the last layer are enough to read the colours.
        label = f"layer {depth}" if place in (0, len(members) - 1) else None
        panel.plot(range(1, len(shares) + 1), shares, color=color, linewidth=1, label=label)
        panel.plot(module.rank, shares[module.rank - 1], "o", color=color, markersize=3)
    if any(bool((spectra[module.name] > 0).any()) for module in members):
        panel.set_yscale("log")
    panel.set_title(kind)
    panel.set_xlabel("direction")
    panel.legend(fontsize="x-small")
