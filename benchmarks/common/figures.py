"""The style of all pictures: colours that colour-blind people tell apart, names that readers know.

Every method has one colour and one marker in all pictures. Points are means, bars are standard errors,
and lines are labelled where they end, so that no legend has to be matched by colour alone. Where too
many points lie close together for that, a legend shows each marker.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kprune_ext.files.presentation import COLOURS, empty_figure

_GREY = "0.35"
#: Settings for matplotlib, so that a picture is the same whenever it is drawn.
_STYLE: Mapping[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "errorbar.capsize": 2.5,
    "font.size": 10,
    "grid.color": "0.92",
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    "svg.hashsalt": "pictures",
}


@dataclass(frozen=True)
class Look:
    """How a method appears in all pictures.

    Attributes:
        name: The name that readers know.
        colour: A colour of Okabe and Ito.
        marker: A marker of matplotlib, so that colour is not all that tells methods apart.
    """

    name: str
    colour: str
    marker: str


LOOKS: Mapping[str, Look] = {
    "dense": Look("dense model", COLOURS["black"], "*"),
    "before": Look("before training", COLOURS["black"], "*"),
    "ours": Look("K-prune", COLOURS["blue"], "o"),
    "paper": Look("K-prune as published", COLOURS["sky blue"], "s"),
    "fisher_mask": Look("Fisher mask", COLOURS["green"], "^"),
    "magnitude": Look("magnitude", COLOURS["vermillion"], "v"),
    "ours_distilled": Look("K-prune, distilled", COLOURS["sky blue"], "s"),
    "fisher_mask_distilled": Look("Fisher mask, distilled", COLOURS["orange"], "D"),
    "magnitude_distilled": Look("magnitude, distilled", COLOURS["purple"], "P"),
    "flap": Look("FLAP", COLOURS["orange"], "D"),
    "flap_units": Look("FLAP, other order", COLOURS["yellow"], "d"),
    "local_refit": Look("FLAP's units, local refit", COLOURS["sky blue"], "s"),
    "uniform": Look("K-prune, equal layers", COLOURS["sky blue"], "s"),
    "flap_tuned": Look("FLAP's units, tuned", COLOURS["green"], "d"),
    "wanda_sp": Look("Wanda-sp", COLOURS["purple"], "P"),
    "kpm": Look("CorDA kpm", COLOURS["blue"], "o"),
    "ipm": Look("CorDA ipm", COLOURS["sky blue"], "^"),
    "ipm-paper": Look("CorDA ipm, paper's scaling", COLOURS["green"], "<"),
    "ipm-sqrt": Look("CorDA ipm, square root", COLOURS["orange"], ">"),
    "lora": Look("LoRA", COLOURS["vermillion"], "s"),
    "lora+decay": Look("LoRA, weight decay", COLOURS["orange"], "D"),
    "lora+knowledge": Look("LoRA, knowledge decay", COLOURS["purple"], "P"),
    "kpm+decay": Look("CorDA kpm, weight decay", COLOURS["green"], "^"),
    "kpm+knowledge": Look("CorDA kpm, knowledge decay", COLOURS["black"], "d"),
    "sc_lora": Look("SC-LoRA", COLOURS["yellow"], "v"),
    "lora_null": Look("LoRA-Null", COLOURS["sky blue"], "<"),
    "pissa": Look("PiSSA", COLOURS["purple"], "D"),
    "full": Look("all weights", COLOURS["black"], "P"),
    "none": Look("not trained", COLOURS["black"], "o"),
    "corda": Look("CorDA ipm", COLOURS["sky blue"], "^"),
    "peft": Look("PEFT's CorDA", COLOURS["vermillion"], "s"),
    "peft_corda": Look("peft_corda", COLOURS["blue"], "o"),
    "svd": Look("plain SVD", COLOURS["vermillion"], "v"),
}
DATA_NAMES: Mapping[str, str] = {
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "squad": "SQuAD",
    "wikitext": "WikiText-2",
    "wikitext2": "WikiText-2",
    "c4": "C4",
    "nq": "NQ-open",
}
METRIC_NAMES: Mapping[str, str] = {
    "accuracy": "accuracy, %",
    "f1": "F1, %",
    "spearman": "Spearman correlation, %",
}


@dataclass(frozen=True)
class End:
    """Where a line ends, and how it looks, for its label."""

    x: float
    y: float
    look: Look


def look_of(name: str) -> Look:
    """How a method looks; one that has no look of its own is drawn in grey by its own name."""
    return LOOKS.get(name, Look(name, _GREY, "X"))


def data_name(name: str) -> str:
    """The name that readers know of a data set."""
    return DATA_NAMES.get(name, name)


def make_panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and its panels: side by side up to three, more of them in two rows.

    Args:
        count: Number of panels.
        width: Width in inches if all panels were side by side.
        height: Height in inches of one row.
    """
    from matplotlib import rc_context

    with rc_context(dict(_STYLE)):
        rows = 1 if count <= 3 else 2
        columns = -(-count // rows)
        figure = empty_figure(width * columns / count, height * rows)
        panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
        for panel in panels[count:]:
            panel.remove()
        return figure, panels[:count]


def draw_points(
    panel: Any, points: Sequence[tuple[float, Sequence[float]]], look: Look, line: bool = True
) -> End | None:
    """Draw means with standard errors, joined by a line.

    Args:
        panel: Axes of matplotlib.
        points: Places on the horizontal axis, each with the values of several seeds or samples.
        look: The method's look.
        line: Whether the points are joined.

    Returns:
        The last point, for `label_ends`; None without points.
    """
    return draw_cloud(panel, [([x], list(values)) for x, values in points], look, line)


def draw_cloud(
    panel: Any,
    points: Sequence[tuple[Sequence[float], Sequence[float]]],
    look: Look,
    line: bool = True,
) -> End | None:
    """The same where both coordinates are values of several seeds, each with its error bars."""
    if not points:
        return None
    xs = [statistics.mean(values) for values, _ in points]
    ys = [statistics.mean(values) for _, values in points]
    panel.errorbar(
        xs,
        ys,
        xerr=[_error(values) for values, _ in points],
        yerr=[_error(values) for _, values in points],
        color=look.colour,
        marker=look.marker,
        markersize=12 if look.marker == "*" else None,
        linestyle="-" if line else "none",
        capsize=2.5,
    )
    return End(xs[-1], ys[-1], look)


def label_ends(panel: Any, ends: Sequence[End | None], size: float = 9) -> None:
    """Write each line's name beside its end, in its colour, moved apart where names would overlap."""
    found = [end for end in ends if end is not None]
    if not found:
        return
    panel.margins(x=0.08, y=0.08)
    panel.figure.canvas.draw()
    height = size * panel.figure.dpi / 72 * 1.35
    placed: list[tuple[float, float]] = []
    for end in sorted(found, key=lambda end: end.y):
        x, y = panel.transData.transform((end.x, end.y))
        near = [below for at, below in placed if abs(at - x) < 60 * panel.figure.dpi / 72]
        wanted = max([y, *(below + height for below in near)])
        placed.append((x, wanted))
        panel.annotate(
            end.look.name,
            (end.x, end.y),
            xytext=(9, (wanted - y) * 72 / panel.figure.dpi),
            textcoords="offset points",
            va="center",
            color=end.look.colour,
            fontsize=size,
            annotation_clip=False,
        )


def draw_bars(panel: Any, rows: Sequence[tuple[str, Sequence[float], Look]], form: str) -> None:
    """Draw horizontal bars from the top down, each with its value written at its end.

    Args:
        panel: Axes of matplotlib.
        rows: Of each bar the label, the values of several runs, and the look.
        form: Format of the value, for example `"{:.1f} ×"`.
    """
    means = [statistics.mean(values) for _, values, _ in rows]
    places = range(len(rows))
    panel.barh(
        places,
        means,
        xerr=[_error(values) for _, values, _ in rows] if any(map(_several, rows)) else None,
        color=[look.colour for _, _, look in rows],
        height=0.66,
        capsize=2.5,
    )
    panel.set_yticks(places, [label for label, _, _ in rows])
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    panel.margins(x=0.18)
    for place, mean, (_, values, _) in zip(places, means, rows, strict=True):
        panel.annotate(
            form.format(mean),
            (max(mean, 0.0) + _error(values), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )


def show_rates(panel: Any) -> None:
    """Make the horizontal axis logarithmic, with plain ticks, as learning rates are written."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(axis="x", labelsize=8)


def legend_beside(figure: Any, looks: Sequence[Look]) -> None:
    """Write the names of all looks to the right of the panels, each with its marker."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="none", label=look.name)
        for look in looks
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)


def save(figure: Any, path: Path, source: str = "") -> None:
    """Write a figure, as its ending says; SVG has no date, and names what it was drawn from.

    Args:
        figure: A figure of `make_panels`.
        path: File to write.
        source: What the picture was drawn from, for the file's metadata.
    """
    from matplotlib import rc_context

    about = {"Date": None, "Description": source} if path.suffix == ".svg" else {}
    with rc_context(dict(_STYLE)):
        figure.savefig(path, dpi=120, metadata=about)


def _several(row: tuple[str, Sequence[float], Look]) -> bool:
    return len(row[1]) > 1


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean, zero for a single value."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / math.sqrt(len(values))
