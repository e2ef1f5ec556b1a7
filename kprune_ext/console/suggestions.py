"""What was probably meant by a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

_MOST = 3


def likely(
    typed: str, known: Collection[str], meant: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """Returns up to three known names that were probably meant, the likeliest first.

    Args:
        typed: The name that does not exist.
        known: Those that do.
        meant: Names that are to be suggested, by a name that other programs use.
    """
    if not typed:
        return []
    found = list((meant or {}).get(typed, ()))
    found += difflib.get_close_matches(typed, known, n=_MOST, cutoff=0.75)
    found += [name for name in known if typed in name.split("_") or name.startswith(typed)]
    found += difflib.get_close_matches(typed, known, n=1, cutoff=0.6)
    return [name for name in dict.fromkeys(found) if name in known][:_MOST]


def question(names: Sequence[str]) -> str:
    """Returns "Did you mean a, b or c?" with a space before it, or nothing without names."""
    if not names:
        return ""
    *first, last = names
    return f" Did you mean {', '.join(first)}{' or ' if first else ''}{last}?"
