"""Reads the dense weight of a target module."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kprune_ext.common.placement import full_tensor, gathered, shape_of

from .quantized import _dequantized, _is_of_torchao, _weight, quantization_of

SUPPORTED = (
    "torch.nn.Linear and transformers' Conv1D with floating-point weights, bitsandbytes' Linear4bit and "
    "Linear8bitLt, and torchao's 8-bit weights"
)


def is_supported(module: nn.Module) -> bool:
    """Whether this module can have a CORDA adapter."""
    if quantization_of(module) is not None:
        return True
    # Quantized layers of other packages subclass nn.Linear, but hold packed integers or an unknown
    # tensor subclass.
    if not isinstance(module, nn.Linear | Conv1D) or _is_of_torchao(_weight(module)):
        return False
    return _weight(module).is_floating_point() and len(shape_of(_weight(module))) == 2


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Returns the weight shape `(out, in)` of a supported module."""
    if isinstance(module, nn.Linear):
        # A quantized weight has another shape.
        return module.out_features, module.in_features
    rows, columns = shape_of(_weight(module))
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def dense_weight(name: str, module: nn.Module) -> Tensor:
    """Returns the detached weight `W (out, in)` of a supported module.

    The result shares memory with a dense weight. A quantized weight is dequantized to the values that
    the layer multiplies by. A weight offloaded by accelerate is loaded, and one sharded over processes
    is gathered, for which all processes must call this function.

    Raises:
        ValueError: If the weight is not in memory (on the meta device, and not offloaded either).
    """
    with gathered(module):
        if _weight(module).device.type == "meta":
            raise ValueError(
                f"The weight of {name} is not in memory (it is on the meta device, so not loaded yet). "
                "CORDA reads each target weight once. Load the model onto CPU or GPU first."
            )
        if quantization_of(module) is not None:
            return _dequantized(module)
        weight = full_tensor(_weight(module))
        return weight.T if isinstance(module, Conv1D) else weight


def full_bias(module: nn.Module) -> Tensor | None:
    """Returns the bias `(out,)` of a module, loaded or gathered as by `dense_weight`."""
    if getattr(module, "bias", None) is None:
        return None
    with gathered(module):
        return full_tensor(cast(Tensor, module.bias))


def decomposable(weight: Tensor) -> Tensor:
    """Returns the weight in at least float32, for linear algebra."""
    return weight if weight.dtype == torch.float64 else weight.float()


def _innermost(module: nn.Module) -> nn.Module:
    while hasattr(module, "base_layer"):
        module = cast(nn.Module, module.base_layer)
    return module
