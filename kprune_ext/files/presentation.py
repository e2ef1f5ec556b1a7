"""Sections of model cards (README.md), and figures."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from .writing import replacing

CARD_NAME = "README.md"
DISTRIBUTION = "peft-corda"
#: Colours that colour-blind people tell apart, by Okabe and Ito (https://jfly.uni-koeln.de/color/).
COLOURS = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky blue": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
}


def with_section(text: str, section: str | None, owner: str) -> str:
    """Returns a model card with a section at its end, in place of an earlier one.

    HTML comments mark the beginning and end of the section, so that saving again replaces it and
    leaves the rest of the card unchanged.

    Args:
        text: The text of the card.
        section: The section, ending in a line break, or None to remove an earlier one.
        owner: Name of the package that the section belongs to.
    """
    start, end = f"<!-- {owner}: start -->", f"<!-- {owner}: end -->"
    # From the last beginning before an end: an earlier one without an end is followed by other text.
    inner = rf"(?:(?!{re.escape(start)}).)*?"
    found = re.compile(rf"\n*{re.escape(start)}{inner}{re.escape(end)}\n*", flags=re.DOTALL)
    if section is None and found.search(text) is None:
        return text
    rest = found.sub("\n\n", text).rstrip("\n")
    return rest + "\n" if section is None else f"{rest}\n\n{start}\n{section}{end}\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown, without a line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], below: str = "") -> str:
    """Returns a table as HTML, for notebooks.

    Args:
        header: The names of the columns.
        rows: The cells of each row.
        below: Text under the table, whose line breaks are kept.
    """

    def line(cells: Sequence[str], kind: str) -> str:
        inside = "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(line(row, "td") for row in rows)
    text = f"<pre>{html.escape(below)}</pre>" if below else ""
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>{text}"


def how_to_install() -> str:
    """Returns Markdown that says how to install this distribution, which is not on a package index."""
    url = repository_url()
    if url is not None:
        return f"```bash\npip install git+{url}\n```"
    return f"```bash\npip install .  # in a clone of the repository of {DISTRIBUTION}\n```"


def repository_url() -> str | None:
    """Returns the repository's address, from the package's metadata or from where pip installed it.

    None if neither names one. An address that may hold a password is never returned.
    """
    try:
        installed = distribution(DISTRIBUTION)
    except PackageNotFoundError:
        return None
    entries = installed.metadata.get_all("Project-URL") or []
    named = {name.strip(): url.strip() for name, _, url in (e.partition(",") for e in entries)}
    given = json.loads(installed.read_text("direct_url.json") or "{}")
    found = named.get("Repository") or (given.get("url") if "vcs_info" in given else None)
    plain = isinstance(found, str) and re.fullmatch(r"https://[^\s@]+", found)
    return found if plain else None


def empty_figure(width: float, height: float) -> Any:
    """Creates a matplotlib figure of this size in inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed. Install it with: "
            "pip install 'peft-corda[plots]'"
        ) from error
    # Not with pyplot, which would choose a backend for the whole process.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure; the file appears only when it is complete.

    Args:
        figure: A figure from `empty_figure`.
        path: Path of the file. Its ending sets the format; without one, it is PNG.

    Raises:
        ValueError: If matplotlib does not know the format.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png", dpi=120)


def check_figure(path: str | os.PathLike[str]) -> None:
    """Checks that a figure can be written in the format that a path names, before the work.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib does not know the format.
    """
    known = empty_figure(1, 1).canvas.get_supported_filetypes()
    ending = Path(path).suffix[1:].lower() or "png"
    if ending not in known:
        raise ValueError(
            f"Figures cannot be written as {ending!r}, the ending of {os.fspath(path)!r}. Give the path "
            f"of a file that ends in one of {', '.join(sorted(known))}."
        )
