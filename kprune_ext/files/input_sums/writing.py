"""Writing of a file of input sums, one sum at a time, so that no two need be in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...common.fingerprints import SAMPLE_SIZE, sample_of
from ..replacement import create_as
from ..writing import replacing
from .reading import FORMAT, FORMAT_VERSION, LAYERS, LayerInputs

_KINDS = {torch.float32: ("F32", "<f4"), torch.float64: ("F64", "<f8")}
# Of the header: what each module takes besides its name, which may stand there four times, most of it
# the entries of its weight.
_AROUND_A_NAME = 400 + 24 * SAMPLE_SIZE
_ALIGNMENT = 64


@contextmanager
def written_sums(path: str | os.PathLike[str], names: Collection[str]) -> Iterator[SumsWriter]:
    """Writes a safetensors file while the block runs; it appears only when it is complete.

    Args:
        path: Path of the file, of `(in, in)` numbers for each sum.
        names: Names of all modules that the sums may be of.

    Yields:
        The writer, to be given one sum after another.

    Raises:
        OSError: If the file cannot be written, as on a full disk.
    """
    with replacing(path) as temporary:
        create_as(path, temporary)
        with open(temporary, "r+b") as file:
            writer = SumsWriter(file, names)
            yield writer
            writer.finish()


class SumsWriter:
    """Writes sums to a file as they come, and at the end what is where.

    The format has the list of tensors before their values, so room is kept for it.

    Args:
        file: The file, open for writing.
        names: Names of all modules that the sums may be of.
    """

    def __init__(self, file: BinaryIO, names: Collection[str]) -> None:
        room = _AROUND_A_NAME + sum(_AROUND_A_NAME + 4 * len(name.encode()) for name in names)
        self._start = -(-room // _ALIGNMENT) * _ALIGNMENT
        self._file = file
        self._entries: dict[str, Any] = {}
        self._layers: list[LayerInputs] = []
        self._end = 0
        file.seek(self._start)

    def add(self, modules: Mapping[str, Tensor], total: Tensor, tokens: int) -> None:
        """Writes the sum of the inputs that some modules share.

        Args:
            modules: The weight `(out, in)`, by the name of the module. Of it the file has the shape, and
                some entries by which the model is recognised.
            total: The sum `(in, in)`, symmetric, in float32 or float64.
            tokens: Number of tokens in it.
        """
        shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in modules.items()}
        samples = {name: tuple(sample_of(weight).tolist()) for name, weight in modules.items()}
        layer = LayerInputs(shapes, tokens, samples)
        kind, numbers = _KINDS[total.dtype]
        values = np.ascontiguousarray(total.cpu().numpy(), dtype=numbers)
        self._file.write(values.data)
        begin, self._end = self._end, self._end + values.nbytes
        self._entries[layer.leader] = {
            "dtype": kind,
            "shape": list(total.shape),
            "data_offsets": [begin, self._end],
        }
        self._layers.append(layer)

    def finish(self) -> None:
        """Writes what the file has, in the room before the sums."""
        rows = [
            {"modules": row.modules, "tokens": row.tokens, "samples": row.samples}
            for row in self._layers
        ]
        about = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            LAYERS: _compact(rows),
        }
        header = _compact({"__metadata__": about, **self._entries}).encode()
        size = self._start - 8
        assert len(header) <= size, "the room is enough for all modules that were named"
        self._file.seek(0)
        self._file.write(size.to_bytes(8, "little") + header.ljust(size))


def _compact(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False)
