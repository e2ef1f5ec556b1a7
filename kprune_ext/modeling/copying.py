"""Copying of a model for pruning, and the record of the units that are kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.device_map import DeviceMap, copy_weights, device_map_of
from ..units.kept import KeptUnits, kept_units, store_kept_units
from .classes import PRUNED_CLASSES, UnevenLayers


def uneven_copy(model: PreTrainedModel, device_map: DeviceMap | None = None) -> PreTrainedModel:
    """Copies a supported model into the class that can be pruned, with all units.

    The copy has the model's weights and dtype in memory of its own, and is in evaluation mode. The
    global random state is left as it was.

    Args:
        model: The model; its weights may be placed on several devices, or offloaded by accelerate.
        device_map: Device map of the copy; by default that of the model.
    """
    is_pruned = isinstance(model, UnevenLayers)
    pruned_class: Any = type(model) if is_pruned else PRUNED_CLASSES[type(model)]
    settings = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        settings.pop(name, None)
    config = pruned_class.config_class(**settings)
    store_kept_units(config, kept_units(config))
    with torch.random.fork_rng(devices=[]):
        copy: Any = pruned_class._from_config(
            config,
            attn_implementation=model.config._attn_implementation,
            **_head_options(model),
        )
    copy_weights(model, copy, device_map_of(model) if device_map is None else device_map)
    return copy.eval()


def _head_options(model: Any) -> dict[str, Any]:
    """Returns the constructor's option for a base model without its pooling layer."""
    bare = model.base_model is model and getattr(model, "pooler", model) is None
    return {"add_pooling_layer": False} if bare else {}


def record_kept(model: PreTrainedModel, units: Iterable[tuple[list[int], list[int]]]) -> None:
    """Records in a model's config the heads and neurons of each layer that are kept.

    Args:
        model: The model that was just pruned.
        units: The heads and neurons kept, per layer, as numbered before this pruning.
    """
    rows = [
        KeptUnits(
            tuple(before.heads[index] for index in heads),
            tuple(before.neurons[index] for index in neurons),
        )
        for before, (heads, neurons) in zip(kept_units(model.config), units, strict=True)
    ]
    store_kept_units(model.config, rows)
