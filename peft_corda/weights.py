"""Reading the dense weight of a target module."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SUPPORTED = "torch.nn.Linear and transformers' Conv1D with floating-point weights"


def is_supported(module: nn.Module) -> bool:
    """Whether a CORDA adapter can be put on this module."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    # Quantised layers subclass nn.Linear, but hold packed integers.
    return _weight(module).is_floating_point() and _weight(module).ndim == 2


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """`(out, in)` of a supported module."""
    rows, columns = _weight(module).shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def dense_weight(name: str, module: nn.Module) -> Tensor:
    """`W (out, in)` of a supported module: detached, and sharing memory with it.

    Raises:
        ValueError: if the weight is not in memory (offloaded, or on the meta device).
    """
    weight = _weight(module).detach()
    if weight.device.type == "meta":
        raise ValueError(
            f"The weight of {name} is not in memory (it is on the meta device: offloaded, or not "
            "loaded yet). CORDA reads each target weight once: load the model onto CPU or GPU first."
        )
    return weight.T if isinstance(module, Conv1D) else weight


def decomposable(weight: Tensor) -> Tensor:
    """The weight in at least float32, for linear algebra."""
    return weight if weight.dtype == torch.float64 else weight.float()


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)
