"""`fit_to_budget`: a trained adapter, scaled down until it forgets no more than it may."""

from __future__ import annotations

import math
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..factors import CordaFactors
from .layers import MeasuredLayer, measured_layers
from .measure import Forgetting, measured


def fit_to_budget(
    model: nn.Module,
    factors: CordaFactors | str,
    *,
    forgetting: float,
    adapter_name: str | None = None,
) -> Forgetting:
    """Scale an adapter down until its `forgetting` is a given number. Runs no model.

    The update of every layer is multiplied by one number below 1, exactly, since the update is
    proportional to the adapter's scale: `lora_alpha` of the config is multiplied by it, and each
    `alpha_pattern`, so the adapter is saved and loaded as it then is. An adapter that is within its
    budget is left as it is.

    Args:
        model: A model with a CORDA adapter or a plain LoRA, not merged.
        factors: As for `peft_corda.forgetting`.
        forgetting: The budget, compared with `Forgetting.value`.
        adapter_name: Name of the adapter; the active one if None.

    Returns:
        The forgetting of the adapter as it then is.

    Raises:
        TypeError: As `peft_corda.forgetting`.
        ValueError: As `peft_corda.forgetting`, if the budget is not a number greater than 0, or if
            the adapter is merged. The adapter is then unchanged.
    """
    if not (isinstance(forgetting, int | float) and 0 < forgetting < math.inf):
        raise ValueError(f"forgetting must be a number greater than 0, got {forgetting!r}.")
    layers = measured_layers(model, factors, adapter_name)
    merged = [own.name for own in layers if own.adapter_name in own.layer.merged_adapters]
    if merged:
        raise ValueError(
            f"The adapter {layers[0].adapter_name!r} is merged into the base weights. Call "
            "unmerge_adapter() before fit_to_budget."
        )
    before = measured(layers)
    if before.value <= forgetting:
        return before
    if not math.isfinite(before.value):
        raise ValueError(
            "The adapter has NaN or infinite values, so it cannot be scaled down to a budget. Load an "
            "earlier checkpoint."
        )
    unwrapped: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    _scale(layers, unwrapped.peft_config[layers[0].adapter_name], forgetting / before.value)
    return measured(layers)


def _scale(layers: list[MeasuredLayer], config: Any, factor: float) -> None:
    """Multiply the update of all layers by a factor."""
    config.lora_alpha = config.lora_alpha * factor
    patterns = config.alpha_pattern or {}
    config.alpha_pattern = {key: alpha * factor for key, alpha in patterns.items()}
    for own in layers:
        layer, name = own.layer, own.adapter_name
        divisor = math.sqrt(layer.r[name]) if config.use_rslora else layer.r[name]
        as_configured = layer.scaling[name] == layer.lora_alpha[name] / divisor
        layer.lora_alpha[name] = layer.lora_alpha[name] * factor
        # The very number that loading the config gives, unless the caller has set another scale.
        scaled = layer.lora_alpha[name] / divisor
        layer.scaling[name] = scaled if as_configured else layer.scaling[name] * factor
