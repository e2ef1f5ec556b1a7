"""Questions about paths."""

from __future__ import annotations

import os
from collections.abc import Collection


def same_file(first: str, second: str) -> bool:
    """Returns whether two absolute paths name one file."""
    if first == second:
        return True
    try:
        return os.path.samefile(first, second)  # hard links, and file systems that ignore case
    except OSError:
        return False


def contains(folder: str, path: str) -> bool:
    """Returns whether `path` is `folder` or lies in it; both are absolute."""
    try:
        return os.path.commonpath([folder, path]) == folder
    except ValueError:  # on different drives
        return False


def other_entries(folder: str, replaceable: Collection[str]) -> list[str]:
    """Returns the names of a folder's entries other than the files named in `replaceable`."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name not in replaceable or not entry.is_file(follow_symlinks=False)
        )
