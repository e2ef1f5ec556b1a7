"""The adapter layer: `base(x) + s · (B A − B0 A0) dropout(x)`.

`A0 (r, in)` and `B0 (out, r)` are the frozen start. What is trained, as `lora_A` and `lora_B`, is the
change `ΔA = A − A0` and `ΔB = B − B0`, which is zero at first: whatever pulls parameters to zero, such
as weight decay, pulls the model to its base, and in 16 bits small changes are not rounded away next to
the start. The base weight is never changed, so disabling, deleting or unloading the adapter restores
the base model bit for bit, and a checkpoint loads on the original base model.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from kprune_ext.common.placement import execution_device, fill, is_dtensor, is_partitioned

from ..base_model.weights import _innermost, weight_shape
from ..decomposition.low_rank import update_product
from .difference import add_difference, is_transformed
from .observers import is_observed
from .start_buffers import OLD_NAMES, StartBuffers, without_old_names


class CordaVariant(LoraVariant):
    """Variant that PEFT's LoRA layer calls in place of its `B A x`; `module` is a `CordaLayer`."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Do nothing; `CordaLayer.start_adapter` sets the start."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        change_a, change_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        start_a, start_b = module.lora_start_A[active_adapter], module.lora_start_B[active_adapter]
        scale, dropout = module.scaling[active_adapter], module.lora_dropout[active_adapter]
        # Sharded parameters are full tensors only within the forward of their own modules.
        apart = is_partitioned(change_a.weight) or is_dtensor(change_a.weight)
        if not (apart or result.is_meta or is_transformed()):
            module.lora_start_B.check_filled(active_adapter, change_b.weight)
        if not (apart or is_observed(change_a, change_b, dropout)):
            dropped = dropout(x) if dropout.training else x
            summed = add_difference(
                result, dropped, change_a.weight, change_b.weight, start_a, start_b, scale
            )
        else:
            # B A − B0 A0 = ΔB A + B0 ΔA, each term zero at the start.
            dropped = dropout(x)
            hidden = change_a(dropped)
            dtype = hidden.dtype  # FSDP2's mixed precision casts parameters, but not buffers
            whole = hidden + F.linear(dropped.to(dtype), start_a.to(dtype))  # A x
            added = change_b(whole) + F.linear(hidden, start_b.to(dtype))
            summed = result + added * scale
        if change_b.weight.requires_grad and summed.requires_grad:
            module.lora_start_B.watch(active_adapter, summed)
        return summed


class CordaLayer(LoraLayer):
    """Base class of all CORDA adapter layers; comes before PEFT's LoRA layer in their bases."""

    lora_start_A: StartBuffers
    lora_start_B: StartBuffers
    fan_in_fan_out: bool

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant:
        return CordaVariant()

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter without a start; its output is zero until one is set."""
        if not hasattr(self, "lora_start_A"):
            self.lora_start_A, self.lora_start_B = StartBuffers(), StartBuffers()
            # PEFT then moves, casts, saves and deletes them with the adapter.
            self.other_param_names = (*self.other_param_names, *OLD_NAMES)
        out_features, in_features = weight_shape(_innermost(cast(nn.Module, self)))
        self.lora_start_A[adapter_name] = torch.zeros(r, in_features)
        self.lora_start_B[adapter_name] = torch.zeros(out_features, r)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        if config.init_lora_weights is False:
            # The caller wants random factors, which count as a start.
            self.lora_start_B.started.add(adapter_name)
        if getattr(config, "corda_method", None) is None:
            self.lora_start_B.may_train_without.add(adapter_name)

    def start_adapter(self, adapter_name: str, factor_a: Tensor, factor_b: Tensor) -> None:
        """Set the start of an adapter, `A0 (r, in)` and `B0 (out, r)`, with no change from it yet."""
        nothing = torch.zeros_like(factor_a), torch.zeros_like(factor_b)
        self.set_factors(adapter_name, *nothing, factor_a, factor_b)

    def set_factors(
        self,
        adapter_name: str,
        change_a: Tensor,
        change_b: Tensor,
        start_a: Tensor,
        start_b: Tensor,
    ) -> None:
        """Set the start `A0` and `B0` of an adapter, and the trained changes `ΔA` and `ΔB`."""
        device = self._base_device()
        if device.type == "meta":  # the base is loaded later, the frozen factors are not
            device = start_a.device
        for linears, starts, change, start in (
            (self.lora_A, self.lora_start_A, change_a, start_a),
            (self.lora_B, self.lora_start_B, change_b, start_b),
        ):
            linear = _linear(linears, adapter_name)
            # The layout that a checkpoint loads into, so that the same kernels run after loading.
            value = change.to(device, linear.weight.dtype).contiguous()
            if linear.weight.is_meta:
                linear.weight = nn.Parameter(
                    value.clone(), requires_grad=linear.weight.requires_grad
                )
            else:
                # In place, since an optimizer may already hold the parameter.
                fill(linear.weight, value)
            starts[adapter_name] = start.to(value).contiguous().clone()
        self.lora_start_B.started.add(adapter_name)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as any module, also what earlier versions saved.

        It is an error if the state has an adapter without its start, and the adapter has none yet.
        """
        without_old_names(state_dict, prefix, list(self.lora_A))
        for part, start in (("lora_A", "lora_start_A"), ("lora_B", "lora_start_B")):
            for name in self.lora_A:
                factor, key = f"{prefix}{part}.{name}.weight", f"{prefix}{start}.{name}"
                is_missing = factor in state_dict and key not in state_dict
                if is_missing and name not in self.lora_start_B.started:
                    error_msgs.append(
                        f"The checkpoint has {factor}, but lacks {key}, without which the adapter "
                        "computes something else. Save it again with save_pretrained."
                    )
        cast(Any, super())._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def take_start(self, adapter_name: str, original: str, is_clone: bool) -> None:
        """Take over the start of another adapter, with which copied factors compute the same.

        Args:
            adapter_name: Name of the new adapter.
            original: Name of the adapter whose start is taken over, if it has one.
            is_clone: Whether the new adapter also has its dtype, and counts as started.
        """
        if original not in self.lora_A:
            return
        if is_clone:
            self.cast_adapter(adapter_name, self.adapter_dtype(original))
        if original not in self.lora_start_B.started:
            return
        start_a, start_b = self.lora_start_A[original], self.lora_start_B[original]
        is_meta = start_a.is_meta or _linear(self.lora_A, adapter_name).weight.is_meta
        if not is_meta and (bool(start_a.any()) or bool(start_b.any())):
            self.start_adapter(adapter_name, start_a, start_b)
        if is_clone:
            self.lora_start_B.started.add(adapter_name)
        else:
            self.lora_start_B.started.discard(adapter_name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move to the base layer's device, and to its dtype only while it has no start.

        PEFT also calls this after loading weights with `low_cpu_mem_usage`, where a cast to the
        bfloat16 of a base layer would round a float32 adapter.
        """
        target = self._base_device() if device is None else device
        if adapter_name not in self.lora_start_B.started:
            super()._move_adapter_to_device_of_base_layer(adapter_name, target)
            return
        if target.type == "meta":
            return
        for linears in (self.lora_A, self.lora_B):
            linears[adapter_name].to(target)
        for start in (self.lora_start_A, self.lora_start_B):
            start[adapter_name] = start[adapter_name].to(target)

    def adapter_dtype(self, adapter_name: str) -> torch.dtype:
        return _linear(self.lora_A, adapter_name).weight.dtype

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Cast the factors of an adapter and their start."""
        for linears in (self.lora_A, self.lora_B):
            linears[adapter_name].to(dtype)
        for starts in (self.lora_start_A, self.lora_start_B):
            starts[adapter_name] = starts[adapter_name].to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns `s (B A − B0 A0)` in the layout of the base weight and the dtype of the adapter."""
        changes = _linear(self.lora_A, adapter).weight, _linear(self.lora_B, adapter).weight
        # At least float32, as the products are sums of many terms.
        working = torch.promote_types(changes[0].dtype, torch.float32)
        left, right = update_product(
            changes[0].to(working),
            changes[1].to(working),
            self.lora_start_A[adapter].to(working),
            self.lora_start_B[adapter].to(working),
        )
        delta = transpose(left @ right, self.fan_in_fan_out) * self.scaling[adapter]
        return delta.to(changes[0].dtype)

    def factors_of(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the changes `ΔA (r, in)`, `ΔB (out, r)` and the start `A0`, `B0`, all detached."""
        return (
            _linear(self.lora_A, adapter_name).weight.detach(),
            _linear(self.lora_B, adapter_name).weight.detach(),
            self.lora_start_A[adapter_name],
            self.lora_start_B[adapter_name],
        )

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        names = check_adapters_to_merge(self, adapter_names)
        return [name for name in names if name in self.lora_A]

    def _base_device(self) -> torch.device:
        # The device of the computation, since the weight itself may be offloaded.
        return execution_device(self.get_base_layer())

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.Corda", "lora.", 1)  # printed as a LoRA layer


class CordaLinear(CordaLayer, LoraLinear):
    """A CORDA adapter on a `torch.nn.Linear` or a transformers `Conv1D`."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        is_conv1d = isinstance(_innermost(base_layer), Conv1D)
        super().__init__(
            base_layer, adapter_name, config=config, is_target_conv_1d_layer=is_conv1d, **kwargs
        )
        # Conv1D stores its weight as (in, out), so the user need not set this.
        self.fan_in_fan_out = is_conv1d


def _linear(layers: nn.ModuleDict, adapter_name: str) -> nn.Linear:
    return cast(nn.Linear, layers[adapter_name])
