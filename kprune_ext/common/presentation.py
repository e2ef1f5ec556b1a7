"""What both packages put into model cards (README.md)."""

from __future__ import annotations

import re

CARD_NAME = "README.md"


def with_section(text: str, section: str | None, owner: str) -> str:
    """The text of a model card with one section at its end, in place of an earlier one.

    HTML comments mark where the section begins and ends, so that saving again replaces it and leaves
    everything else as it is.

    Args:
        text: The card.
        section: The section, ending in a line break, or None to take an earlier one out.
        owner: Name of the package that the section belongs to.
    """
    start, end = f"<!-- {owner}: start -->", f"<!-- {owner}: end -->"
    found = re.compile(rf"\n*{re.escape(start)}.*?{re.escape(end)}\n*", flags=re.DOTALL)
    if section is None and found.search(text) is None:
        return text
    rest = found.sub("\n\n", text).rstrip("\n")
    return rest + "\n" if section is None else f"{rest}\n\n{start}\n{section}{end}\n"
