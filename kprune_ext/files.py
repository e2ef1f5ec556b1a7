"""Files that are whole or not there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary path to write to; it takes the name ``path`` if the block ends without an error.

    The folder is made if need be. After an error nothing is left behind, and a file that was there
    before is as it was.
    """
    whole = os.path.abspath(os.fspath(path))
    os.makedirs(os.path.dirname(whole), exist_ok=True)
    temporary = os.path.join(
        os.path.dirname(whole), f".{os.path.basename(whole)}.{uuid.uuid4().hex}.tmp"
    )
    try:
        yield temporary
        os.replace(temporary, whole)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
