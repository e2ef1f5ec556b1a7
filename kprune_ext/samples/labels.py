"""Labels that calibration data happen to have: for the report alone, never for pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Names of the labels of classes, in the order in which they are looked for.
_NAMES = ("labels", "label", "label_ids")
_SPAN = ("start_positions", "end_positions")


def labels_in(batch: Mapping[str, Any], rows: int) -> Tensor | None:
    """Returns the labels of a batch, `(rows, …)`; None if it has none that could be compared.

    The first and last token of answers to questions are two labels, `(rows, 2)`.

    Args:
        batch: The user's batch.
        rows: Number of its samples.
    """
    span = [_numbers(batch.get(name), rows) for name in _SPAN]
    if all(part is not None and part.ndim == 1 for part in span):
        return torch.stack([part for part in span if part is not None], dim=1)
    for name in _NAMES:
        found = _numbers(batch.get(name), rows)
        if found is not None:
            return found
    return None


def _numbers(value: Any, rows: int) -> Tensor | None:
    try:
        found = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):  # whatever else the data call labels
        return None
    if found.ndim == 0 or len(found) != rows or found.is_complex():
        return None
    return found.cpu().clone()
