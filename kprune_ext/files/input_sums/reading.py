"""A file of input sums, as values that are read when they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = "input_sums"
FORMAT_VERSION = 1
#: Entry of the metadata that lists the layers.
LAYERS = "layers"


@dataclass(frozen=True)
class LayerInputs:
    """Linear layers that share their input, and of how many tokens their sum is.

    Attributes:
        modules: Shape of the weight, `(out, in)`, by the name of the module, in the order of a forward
            pass.
        tokens: Number of tokens in the sum.
        samples: Entries of the weight, from `fingerprints.sample_of`, by the name of the module.
    """

    modules: Mapping[str, tuple[int, int]]
    tokens: int
    samples: Mapping[str, tuple[float, ...]]

    @property
    def leader(self) -> str:
        """Name of the first of the modules, under which the sum is stored."""
        return next(iter(self.modules))

    @property
    def features(self) -> int:
        """Dimensions of the input."""
        return self.modules[self.leader][1]


@dataclass(frozen=True)
class InputSums:
    """A file with `Σ x xᵀ` over the inputs `x` of each linear layer of a model.

    Attributes:
        path: Path of the file.
        layers: What it has, in the order of a forward pass. Each module is in one of them.
    """

    path: str
    layers: tuple[LayerInputs, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> InputSums:
        """Reads what a file has, and none of the sums.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is another kind of file, of a later version, or damaged.
        """
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"There is no file {path!r}. Pass the path of a file of covariances, which pruning with "
                "covariances=path writes."
            )
        try:
            with safe_open(path, framework="pt") as file:
                layers = _layers_in(path, file)
        except (SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, _OtherFileError):
                raise
            raise ValueError(
                f"{path!r} is not a readable file of covariances: {error}. Write it anew."
            ) from error
        return cls(path, layers)

    def read(self, layer: LayerInputs) -> Tensor:
        """Returns the sum `(in, in)`, symmetric, in the dtype in which it was summed.

        Raises:
            ValueError: If it has values that are not finite.
        """
        with safe_open(self.path, framework="pt") as file:
            found: Tensor = file.get_tensor(layer.leader)
        if not bool(torch.isfinite(found).all()):
            raise ValueError(
                f"The covariance of {layer.leader} in {self.path!r} has NaN or infinite values: the "
                "file is damaged. Write it anew."
            )
        return found


class _OtherFileError(ValueError):
    """A file that is readable, but of another kind or version."""


def _layers_in(path: str, file: Any) -> tuple[LayerInputs, ...]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise _OtherFileError(
            f"{path!r} is a safetensors file, but has no covariances. Pass the path of a file of "
            "covariances, which pruning with covariances=path writes."
        )
    if metadata["format_version"] != str(FORMAT_VERSION):
        raise _OtherFileError(
            f"{path!r} has format version {metadata['format_version']}, but this version reads "
            f"{FORMAT_VERSION}. Update the package, or write the file anew."
        )
    layers = tuple(
        LayerInputs(
            {name: (out, of) for name, (out, of) in row["modules"].items()},
            row["tokens"],
            {name: tuple(map(float, row["samples"][name])) for name in row["modules"]},
        )
        for row in json.loads(metadata[LAYERS])
    )
    names = [name for layer in layers for name in layer.modules]
    if not all(layer.modules for layer in layers) or len(set(names)) < len(names):
        raise ValueError("a sum is of no module, or a module has two sums")
    for layer in layers:
        found = tuple(file.get_slice(layer.leader).get_shape())
        wanted = {(shape[1], shape[1]) for shape in layer.modules.values()}
        if wanted != {found} or type(layer.tokens) is not int or layer.tokens < 1:
            raise ValueError(
                f"{layer.leader} has a sum of shape {found} over {layer.tokens} tokens"
            )
    return layers
