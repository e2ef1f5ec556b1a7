"""`knowledge_decay`: decoupled decay of what an adapter changes on the calibration data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kprune_ext.common.placement import is_dtensor, is_partitioned

from ..decomposition.sketch import decay_step
from ..factors import CordaFactors
from .layers import MeasuredLayer, measured_layers


def knowledge_decay(
    optimizer: Optimizer,
    model: nn.Module,
    factors: CordaFactors | str,
    strength: float = 10.0,
    adapter_name: str | None = None,
) -> RemovableHandle:
    """Let each step of an optimizer also lower what an adapter makes the model forget.

    After the optimizer's own step, each layer's factors take a step against the gradient of
    `F² = tr(ΔW C ΔWᵀ) / tr C`, a share `lr · strength` of the way to the minimum along it. It is
    decoupled from the loss and from the optimizer's moments, as AdamW's weight decay is, which is the
    same step for `½ ‖θ‖²`. Unlike it, it leaves alone what is not noticed on the calibration data. As
    it acts along one direction of each layer at a time, it wants a larger number.

    Under accelerate and `DistributedDataParallel`, call it on all processes, with the optimizer before
    or after `prepare`. With `Trainer`, pass a `KnowledgeDecayCallback` instead.

    Args:
        optimizer: The optimizer that trains the adapter.
        model: A model with a CORDA adapter or a plain LoRA.
        factors: As for `peft_corda.forgetting`.
        strength: Strength of the decay, at least 0.
        adapter_name: Name of the adapter; the active one if None.

    Returns:
        A handle, whose `remove()` ends the decay.

    Raises:
        TypeError: As `peft_corda.forgetting`.
        ValueError: As `peft_corda.forgetting`; if the strength is negative or not finite; if the
            optimizer does not train the adapter; or if its parameters are sharded over processes, or
            kept by DeepSpeed in a copy of its own.
    """
    if not (isinstance(strength, int | float) and 0 <= strength < math.inf):
        raise ValueError(f"strength must be a number of at least 0, got {strength!r}.")
    own: Any = optimizer
    while True:
        if type(own).__module__.startswith("deepspeed") or "DeepSpeed" in type(own).__name__:
            raise ValueError(
                "knowledge_decay does not work with DeepSpeed, whose optimizers keep copies of the "
                "parameters. Train with DDP or on one device."
            )
        if not hasattr(own, "optimizer"):
            break
        own = own.optimizer  # as prepared by accelerate
    layers = measured_layers(model, factors, adapter_name)
    _check(layers, own)

    def decay(stepped: Any, args: Any, kwargs: Any) -> None:
        _decay(layers, stepped, strength)

    handle: RemovableHandle = own.register_step_post_hook(decay)
    return handle


@torch.no_grad()
def _decay(layers: list[MeasuredLayer], optimizer: Any, strength: float) -> None:
    rates = {
        id(parameter): float(group["lr"]) * strength
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for own in layers:
        weights = [linear.weight for linear in own.linears]
        shares = [rates.get(id(weight), 0.0) for weight in weights]
        if not any(shares):
            continue
        change_a, change_b, start_a, start_b = own.parts()
        step = decay_step(own.sketch, start_a + change_a, start_b + change_b, start_a, start_b)
        for weight, whole, share in zip(weights, (step.step_a, step.step_b), shares, strict=True):
            weight.sub_(min(share, 1.0) * whole.to(weight.dtype))


def _check(layers: list[MeasuredLayer], optimizer: Any) -> None:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    weights = [linear.weight for own in layers for linear in own.linears]
    if any(is_dtensor(weight) or is_partitioned(weight) for weight in weights):
        raise ValueError(
            "knowledge_decay needs whole parameters, but FSDP or ZeRO-3 shards them over processes. "
            "Train with DDP or on one device."
        )
    if not any(id(weight) in trained for weight in weights):
        raise ValueError(
            f"The optimizer does not train the adapter {layers[0].adapter_name!r}. Give it the model's "
            "parameters that require gradients, and freeze nothing of the adapter."
        )
