"""Reading the dense weight of a target module."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kprune_ext.common.placement import brought_in, shape_of, whole

SUPPORTED = (
    "torch.nn.Linear and transformers' Conv1D with floating-point weights, bitsandbytes' Linear4bit and "
    "Linear8bitLt, and torchao's 8-bit weights"
)
# What quantising may change an entry by, relative to the largest entry of the weight: half of the
# widest gap between two levels, and a little for the quantised scales.
_ERRORS = {"4bit": 0.2, "8bit": 0.01, "torchao": 0.01}


def is_supported(module: nn.Module) -> bool:
    """Whether a CORDA adapter can be put on this module."""
    if quantization_of(module) is not None:
        return True
    # Quantised layers of other packages subclass nn.Linear, but hold packed integers or a tensor
    # subclass of which nothing is known here.
    if not isinstance(module, nn.Linear | Conv1D) or _is_of_torchao(_weight(module)):
        return False
    return _weight(module).is_floating_point() and len(shape_of(_weight(module))) == 2


def quantization_of(module: nn.Module) -> str | None:
    """``"4bit"``, ``"8bit"`` (bitsandbytes) or ``"torchao"`` for a quantised layer, else None."""
    weight = _weight(module)
    name = type(weight).__name__
    if _is_of_torchao(weight):
        # PEFT has no merging for 4-bit weights.
        return None if "Int4" in name else "torchao"
    kind = {"Params4bit": "4bit", "Int8Params": "8bit"}.get(name)
    # bitsandbytes quantises on the move to a device; until then the weight is dense.
    return None if kind is None or weight.is_floating_point() else kind


def rounding_of(module: nn.Module) -> float:
    """How far entries of a quantised weight may be off, relative to the largest one; 0 if dense."""
    return _ERRORS.get(quantization_of(module) or "", 0.0)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """`(out, in)` of a supported module."""
    if isinstance(module, nn.Linear):
        # A quantised weight has another shape.
        return module.out_features, module.in_features
    rows, columns = shape_of(_weight(module))
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def dense_weight(name: str, module: nn.Module) -> Tensor:
    """`W (out, in)` of a supported module: detached; of a dense one sharing memory with it.

    A quantised weight is what the quantised layer multiplies by. One that accelerate has offloaded is
    read, one that is spread over processes is gathered, for which all of them must call this.

    Raises:
        ValueError: if the weight is not in memory (on the meta device, and not offloaded either).
    """
    with brought_in(module):
        if _weight(module).device.type == "meta":
            raise ValueError(
                f"The weight of {name} is not in memory (it is on the meta device: not loaded yet). "
                "CORDA reads each target weight once: load the model onto CPU or GPU first."
            )
        if quantization_of(module) is not None:
            return _dequantized(module)
        weight = whole(_weight(module))
        return weight.T if isinstance(module, Conv1D) else weight


def whole_bias(module: nn.Module) -> Tensor | None:
    """The bias `(out,)` of a module, read or gathered as by `dense_weight`."""
    if getattr(module, "bias", None) is None:
        return None
    with brought_in(module):
        return whole(cast(Tensor, module.bias))


def decomposable(weight: Tensor) -> Tensor:
    """The weight in at least float32, for linear algebra."""
    return weight if weight.dtype == torch.float64 else weight.float()


def is_packed(weight: Tensor) -> bool:
    """Whether bitsandbytes has packed a 4-bit weight for inference on the CPU."""
    state = getattr(weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def unpacked(weight: Tensor) -> tuple[Tensor, Any]:
    """Codes and quantisation state of a 4-bit weight, in the layout that bitsandbytes dequantises.

    On some CPUs a forward pass in evaluation mode packs the weight anew, in place: what is dequantised
    afterwards is something else, without an error.
    """
    state = cast(Any, weight).quant_state
    if not is_packed(weight):
        return weight.data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    # The inverse leaves the scales transposed, unless it quantises them again: they are set here. It
    # changes the state that it is given.
    scales, state = state.absmax.T.reshape(-1).float(), copy.copy(state)
    state.original_nested = False
    codes, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = scales
    return codes, state


@torch.no_grad()
def _dequantized(module: nn.Module) -> Tensor:
    weight, kind = cast(Any, _weight(module)), quantization_of(module)
    if kind == "torchao":
        return cast(Tensor, weight.dequantize()).detach()
    import bitsandbytes

    if kind == "4bit":
        return bitsandbytes.functional.dequantize_4bit(*unpacked(weight)).detach()
    # A forward pass moves codes and scales from the weight into the state.
    state = cast(Any, module.state)
    codes, scales = (weight.CB, weight.SCB) if weight.SCB is not None else (state.CB, state.SCB)
    codes = weight.data if codes is None else codes
    return cast(Tensor, codes.float() * (scales.float() / 127).view(-1, 1))


def _is_of_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao.")


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, getattr(module, "weight", None))
