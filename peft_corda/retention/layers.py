"""The layers of an adapter whose forgetting is measured, CORDA or plain LoRA, and their sketches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from kprune_ext.common.placement import full_tensor, gathered

from ..adapter_layers.layer import CordaLayer
from ..factors import CordaFactors

# Inits that change the base weight, against which the adapter then is no update of the base model.
_CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")

#: The changes `ΔA`, `ΔB` and the start `A0`, `B0` of a layer's adapter.
Parts: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class MeasuredLayer:
    """A layer with an adapter, and what is known of its inputs.

    Attributes:
        name: Name of the module in the base model.
        layer: The layer.
        adapter_name: Name of the adapter.
        sketch: Rows `S (k, in)` of the sketch of its inputs, in float32 on the layer's device.
        input_energy: Mean of `‖x‖²` over the calibration data.
        output_energy: Mean of `‖W x‖²` over the calibration data.
    """

    name: str
    layer: LoraLayer
    adapter_name: str
    sketch: Tensor
    input_energy: float
    output_energy: float

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The modules `lora_A` and `lora_B`, whose weights are trained."""
        name = self.adapter_name
        return cast(nn.Linear, self.layer.lora_A[name]), cast(nn.Linear, self.layer.lora_B[name])

    @property
    def scale(self) -> float:
        """The scale `s` of the update."""
        return float(self.layer.scaling[self.adapter_name])

    def parts(self) -> Parts:
        """Returns `ΔA`, `ΔB`, `A0` and `B0` in float32, the last two zeros for a plain LoRA.

        With sharded weights all processes must call this.
        """
        changes = []
        for linear in self.linears:
            with gathered(linear):
                changes.append(full_tensor(linear.weight).to(self.sketch))
        change_a, change_b = changes
        if not isinstance(self.layer, CordaLayer):
            return change_a, change_b, torch.zeros_like(change_a), torch.zeros_like(change_b)
        starts = self.layer.lora_start_A, self.layer.lora_start_B
        start_a, start_b = (start[self.adapter_name].to(self.sketch) for start in starts)
        return change_a, change_b, start_a, start_b


def measured_layers(
    model: nn.Module, factors: CordaFactors | str, adapter_name: str | None = None
) -> list[MeasuredLayer]:
    """Returns the layers of an adapter, in the order of the model.

    Args:
        model: A model with LoRA or CORDA adapters, which may be wrapped by `DistributedDataParallel`.
        factors: Factors with sketches, or the path of their file.
        adapter_name: Name of the adapter; the active one if None.

    Raises:
        TypeError: If the model has no such adapter, or it is neither LoRA nor CORDA.
        ValueError: If the adapter's form is not supported, or the factors lack a sketch for a layer.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: own for name, own in base.named_modules() if isinstance(own, LoraLayer)}
    adapter = _name_of(layers, adapter_name)
    own = {name: layer for name, layer in layers.items() if adapter in _adapters_of(layer)}
    _check_form(getattr(model, "peft_config", {}).get(adapter), own, adapter)
    if isinstance(factors, str | os.PathLike):
        factors = CordaFactors.load(factors)
    _check_sketches(factors, own)
    return list(_measured(factors, own, adapter))


def _measured(
    factors: CordaFactors, layers: dict[str, LoraLayer], adapter: str
) -> Iterator[MeasuredLayer]:
    moved: dict[tuple[str, torch.device], Tensor] = {}
    for name, layer in layers.items():
        module = factors.modules[name]
        assert module.inputs is not None  # as was checked
        sketch = factors.sketches[module.inputs]
        device = cast(Any, layer).lora_A[adapter].weight.device
        # Layers that share an input share its rows.
        key = (module.inputs, device)
        if key not in moved:
            moved[key] = sketch.rows.to(device, torch.float32)
        yield MeasuredLayer(name, layer, adapter, moved[key], sketch.energy, module.output_energy)


def _adapters_of(layer: LoraLayer) -> list[str]:
    return [*layer.lora_A, *layer.lora_embedding_A]


def _name_of(layers: dict[str, LoraLayer], given: str | None) -> str:
    """Name of the adapter: the one that was given, or the only active one."""
    known = sorted({name for layer in layers.values() for name in _adapters_of(layer)})
    if given is not None:
        if given not in known:
            raise TypeError(
                f"The model has no LoRA or CORDA adapter named {given!r}; it has {known or 'none'}."
            )
        return given
    active = sorted(
        {name for layer in layers.values() for name in layer.active_adapters if name in known}
    )
    if len(active) != 1:
        raise TypeError(
            "Forgetting is measured for one LoRA or CORDA adapter, but the model has "
            f"{active or 'none'} active. Pass adapter_name, or activate one with set_adapter."
        )
    return active[0]


def _check_form(config: Any, layers: dict[str, LoraLayer], adapter: str) -> None:
    """Raises ValueError if the adapter is not the sum of the base weight and a product of two."""
    init = getattr(config, "init_lora_weights", True) if isinstance(config, LoraConfig) else True
    if isinstance(init, str) and init.lower().startswith(_CHANGES_THE_BASE):
        raise ValueError(
            f"The adapter {adapter!r} was started with init_lora_weights={init!r}, which changes the "
            "base weights, so its factors do not tell how far it is from the base model. Measure a "
            "CordaConfig adapter or a LoRA with another init."
        )
    for name, layer in layers.items():
        factors = dict(layer.lora_A).get(adapter)
        if not isinstance(factors, nn.Linear):
            raise ValueError(
                f"The adapter {adapter!r} has the layer {name}, which is not linear, and of which "
                "calibration knows nothing. Leave it out of target_modules."
            )
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        if (variant is not None and not isinstance(layer, CordaLayer)) or (
            cast(nn.Linear, layer.lora_B[adapter]).bias is not None
        ):
            kind = "lora_bias" if variant is None else type(variant).__name__
            raise ValueError(
                f"The adapter {adapter!r} is not a plain LoRA ({kind}), so its update is not B A alone. "
                "Measure an adapter without DoRA, lora_bias and the like."
            )


def _check_sketches(factors: CordaFactors, layers: dict[str, LoraLayer]) -> None:
    missing = [
        name
        for name in layers
        if name not in factors.modules or factors.modules[name].inputs not in factors.sketches
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"The factors have no sketch of the inputs of {missing[0]}{more}, which the adapter "
            "changes. Calibrate again with this model, CordaConfig(corda_sketch=64) and the adapter's "
            "target_modules."
        )
    for name, layer in layers.items():
        shape = factors.modules[name].shape
        found = (layer.out_features, layer.in_features)
        if found != tuple(shape):
            raise ValueError(
                f"The factors belong to another base model: {name} has the shape {found} (out, in), "
                f"and {tuple(shape)} in the factors. Calibrate again with this model."
            )
