"""Files and folders that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary path to write to; it takes the name `path` when the block ends without an error.

    The folder is made if need be. After an error nothing is left behind, and a file that was there
    before is as it was.
    """
    path = os.fspath(path)
    directory = os.path.dirname(os.path.abspath(path))
    os.makedirs(directory, exist_ok=True)
    # Not made by `tempfile`, whose files nobody else may read.
    temporary = os.path.join(directory, f".{os.path.basename(path)}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[str]:
    """As `replacing`, for a folder; one that was there before is replaced with all that is in it."""
    path = os.path.realpath(path)
    directory, name = os.path.split(path)
    os.makedirs(directory, exist_ok=True)
    temporary, old = (
        os.path.join(directory, f".{name}.{uuid.uuid4().hex}.{kind}") for kind in ("tmp", "old")
    )
    os.mkdir(temporary)
    try:
        yield temporary
        if os.path.exists(path):
            os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        if os.path.exists(old):
            os.rename(old, path)
        raise
    finally:
        for leftover in (temporary, old):
            if os.path.isdir(leftover):
                shutil.rmtree(leftover)


def atomic_save(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file; it appears only when it is complete.

    Equal contents give equal bytes, and the file may be read by whoever may read new files.
    """
    with replacing(path) as temporary:
        with open(temporary, "xb"):
            mode = os.stat(temporary).st_mode
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, metadata=dict(metadata))
        _order_metadata(temporary)
        os.chmod(temporary, mode)  # safetensors lets only the owner read


def _order_metadata(path: str) -> None:
    """Sort the metadata of a safetensors file in place, which come in an order of chance."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))
