"""Checks that factors are undamaged: a checksum of their file, shapes, and finite values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .decomposition.directions import OF_INPUTS, Directions
from .decomposition.sketch import InputSketch

# Key of the checksum among the metadata of a file. Files of earlier versions have none.
CHECKSUM = "sha256"
# Metadata that the checksum covers. Others may be added to a file.
_FACTS = ("format", "format_version", "methods", "damping", "weighting", "tokens", "modules")


def checksum_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Returns the SHA-256 of all tensors, and of the metadata about them."""
    digest = hashlib.sha256()
    facts = {key: metadata.get(key) for key in _FACTS}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_sum(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raises ValueError if a file has a checksum that is not that of its content."""
    if CHECKSUM in metadata and metadata[CHECKSUM] != checksum_of(tensors, metadata):
        raise ValueError(
            f"{path!r} is damaged: its content does not match its checksum. Use an intact copy of the "
            "file, or calibrate again."
        )


def check_sound(
    name: str, directions: Mapping[str, Directions], shape: tuple[int, int], sample: Tensor
) -> None:
    """Checks that the shapes of a module's factors belong together and their values are finite.

    Args:
        name: Name of the module, for the message.
        directions: Its directions by method.
        shape: Shape of its weight, `(out, in)`.
        sample: Sample of its weight.

    Raises:
        ValueError: If shapes do not belong together, or values are not finite.
    """
    remedy = "The factors are damaged. Calibrate again, or load an intact copy of their file."
    for method, found in directions.items():
        parts = (found.U, found.S, found.weight_norms)
        rows = shape[1] if method in OF_INPUTS else shape[0]
        rank, shapes = found.U.shape[-1], [tuple(part.shape) for part in parts]
        if shapes != [(rows, rank), (rank,), (rank,)] or rank > min(shape):
            raise ValueError(
                f"The {method!r} factors of {name} with weight (out, in) = {tuple(shape)} have the "
                f"shapes U {shapes[0]}, S {shapes[1]}, weight_norms {shapes[2]}, which do not belong "
                f"together. {remedy}"
            )
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ValueError(
                f"The {method!r} factors of {name} have NaN or infinite values. {remedy}"
            )
    if not bool(sample.isfinite().all()):
        raise ValueError(f"The weight sample of {name} has NaN or infinite values. {remedy}")


def check_sketch(
    name: str, inputs: str | None, shape: tuple[int, int], sketches: Mapping[str, InputSketch]
) -> None:
    """Checks that a module has the sketch that it names, of its shape, with finite values.

    Args:
        name: Name of the module, for the message.
        inputs: Name under which the sketch of its inputs is kept, if there is one.
        shape: Shape of its weight, `(out, in)`.
        sketches: All sketches.

    Raises:
        ValueError: If the sketch is missing, has another shape, or is not finite.
    """
    if inputs is None:
        return
    found = sketches.get(inputs)
    if found is None or found.rows.ndim != 2 or found.rows.shape[1] != shape[1]:
        given = "is missing" if found is None else f"has the shape {tuple(found.rows.shape)}"
        raise ValueError(
            f"The sketch of the inputs of {name} with weight (out, in) = {tuple(shape)} {given}. The "
            "factors are damaged. Calibrate again, or load an intact copy of their file."
        )
    if not bool(found.rows.isfinite().all()):
        raise ValueError(
            f"The sketch of the inputs of {name} has NaN or infinite values. The factors are damaged. "
            "Calibrate again, or load an intact copy of their file."
        )
