"""Weights quantized by bitsandbytes or torchao."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

# Largest change of an entry by quantization, relative to the largest entry of the weight: half of
# the widest gap between two levels, and a little for the quantized scales.
_ERRORS = {"4bit": 0.2, "8bit": 0.01, "torchao": 0.01}


def quantization_of(module: nn.Module) -> str | None:
    """Returns `"4bit"`, `"8bit"` (bitsandbytes) or `"torchao"` for a quantized layer, else None."""
    weight = _weight(module)
    name = type(weight).__name__
    if _is_of_torchao(weight):
        # PEFT cannot merge into the 4-bit weights of torchao.
        return None if "Int4" in name else "torchao"
    kind = {"Params4bit": "4bit", "Int8Params": "8bit"}.get(name)
    # bitsandbytes quantizes on the move to a device; until then the weight is dense.
    return None if kind is None or weight.is_floating_point() else kind


def rounding_of(module: nn.Module) -> float:
    """Largest error of a quantized weight's entries, relative to the largest one; 0 if dense."""
    return _ERRORS.get(quantization_of(module) or "", 0.0)


def is_packed(weight: Tensor) -> bool:
    """Whether bitsandbytes has packed a 4-bit weight for inference on the CPU."""
    state = getattr(weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def unpacked(weight: Tensor) -> tuple[Tensor, Any]:
    """Returns codes and quantization state of a 4-bit weight, as bitsandbytes dequantizes them.

    On some CPUs a forward pass in evaluation mode repacks the weight in place. Dequantizing it
    directly would then give wrong values without an error.
    """
    state = cast(Any, weight).quant_state
    if not is_packed(weight):
        return weight.data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    # The inverse leaves the scales transposed, unless it quantizes them again, so they are set
    # here. It changes the state that it is given, so it is given a copy.
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
