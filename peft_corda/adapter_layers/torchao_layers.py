"""CORDA adapters on layers quantised by torchao. Imported only if such a layer exists."""

from __future__ import annotations

from peft.tuners.lora.torchao import TorchaoLoraLinear

from .layer import CordaLayer


class CordaTorchaoLinear(CordaLayer, TorchaoLoraLinear):
    """A CORDA adapter on a `torch.nn.Linear` whose weight is a quantised tensor of torchao.

    As with LoRA, merging needs a model that was loaded with transformers' `TorchAoConfig`, since only
    that says how to quantise again.
    """
