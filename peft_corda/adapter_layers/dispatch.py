"""Choice of the adapter layer class for a base layer."""

from __future__ import annotations

from typing import Any, cast

from peft.tuners.lora import LoraConfig
from torch import nn

from ..base_model.quantized import quantization_of
from ..base_model.weights import _innermost
from .layer import CordaLayer, CordaLinear


def new_layer(
    base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
) -> CordaLayer:
    """The adapter layer for a supported base layer; `kwargs` are those that PEFT gives LoRA layers."""
    kind = quantization_of(_innermost(base_layer))
    if kind is None:
        return CordaLinear(base_layer, adapter_name, config=config, **kwargs)
    if kind == "torchao":
        from .torchao_layers import CordaTorchaoLinear

        return CordaTorchaoLinear(base_layer, adapter_name, config=config, **kwargs)
    from .bnb_layers import LAYERS

    return cast(CordaLayer, LAYERS[kind](base_layer, adapter_name, config=config, **kwargs))
