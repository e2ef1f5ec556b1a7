"""CORDA adapters on layers quantised by bitsandbytes. Imported only if such a layer exists."""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from ..base_model.quantized import is_packed, unpacked
from ..base_model.weights import dense_weight
from .layer import CordaLayer


class CordaLinear4bit(CordaLayer, Linear4bit):
    """A CORDA adapter on a `bitsandbytes.nn.Linear4bit`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # No gradient flows through a weight that an evaluation pass has packed for the CPU.
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            self._unpack()
        return super().forward(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge as LoRA does: dequantise the weight, add the update, and quantise again."""
        self._unpack()
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """Remove merged adapters again, up to the precision of the quantisation."""
        self._unpack()
        super().unmerge()

    def _unpack(self) -> None:
        weight = cast(Any, self.get_base_layer()).weight
        if is_packed(weight):
            weight.data, weight.quant_state = unpacked(weight)


class CordaLinear8bitLt(CordaLayer, Linear8bitLt):
    """A CORDA adapter on a `bitsandbytes.nn.Linear8bitLt`."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into the dequantised weight, and quantise the result again.

        Raises:
            ValueError: If `safe_merge` is set and the result is not finite; the adapter is then not
                merged.
        """
        for name in self._to_merge(adapter_names):
            merged = self._dense() + self.get_delta_weight(name).float()
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            self._requantize(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Remove merged adapters again, up to the precision of the quantisation."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_A:
                self._requantize(self._dense() - self.get_delta_weight(name).float())

    def _dense(self) -> Tensor:
        return dense_weight("the layer", self.get_base_layer()).float()

    def _requantize(self, weight: Tensor) -> None:
        layer = cast(Any, self.get_base_layer())
        device = layer.weight.device
        # As on loading a checkpoint: moving to the device quantises, and the state is a new one.
        codes: Any = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        layer.weight = codes.to(device)
        threshold, layer.state = layer.state.threshold, bnb.MatmulLtState()
        layer.state.threshold, layer.state.has_fp16_weights = threshold, False
        layer.state.use_pool = threshold > 0


LAYERS: dict[str, type[nn.Module]] = {"4bit": CordaLinear4bit, "8bit": CordaLinear8bitLt}
