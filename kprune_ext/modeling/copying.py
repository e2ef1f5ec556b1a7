"""Copying of a model for pruning, the record of the units that are kept, and its plain form."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..architectures.headless import family_class
from ..architectures.row import Architecture
from ..architectures.table import find_architecture
from ..model_layers.device_map import DeviceMap, copy_weights, device_map_of
from ..units.kept import KeptUnits, kept_units, plain_settings, store_kept_units
from ..units.plain import plain_values
from ..units.sublayers import SubLayer, sublayers
from .classes import (
    UnevenLayers,
    dense_class,
    dense_config_class,
    in_memory_class,
    plain_class,
    uneven_class,
    uneven_config_class,
)
from .twins import Memo, twin_of


def uneven_copy(model: PreTrainedModel, device_map: DeviceMap | None = None) -> PreTrainedModel:
    """Copies a supported model as it is, and gives the copy a class that can be pruned.

    The copy has the model's modules, weights and dtype in memory of its own, and is in evaluation
    mode. The global random state is left as it was.

    Args:
        model: The model; its weights may be placed on several devices, or offloaded by accelerate.
        device_map: Device map of the copy; by default that of the model.
    """
    copied: PreTrainedModel = uneven_copy_within(model, "", device_map)
    return copied


def uneven_copy_within(
    whole: nn.Module, path: str, device_map: DeviceMap | None = None, *, share: bool = False
) -> Any:
    """Copies a module in which one model is to be pruned.

    Args:
        whole: The module.
        path: Path of the model in it, empty if it is the model.
        device_map: Device map of the model's copy; by default that of the model.
        share: Whether parameters share the memory of the module until `own_weights` is called.

    Raises:
        ValueError: If the model's layers have more units than its config says.
    """
    model: Any = whole.get_submodule(path)
    architecture = find_architecture(model)
    device_map = device_map_of(model) if device_map is None else device_map
    memo: Memo = {}
    _copy_configs(whole, model, architecture, memo)
    twin = twin_of(whole, memo)
    pruned: Any = memo[id(model)]
    pruned.__class__ = uneven_class(type(model), architecture)
    if path and isinstance(whole, PreTrainedModel):
        twin.__class__ = in_memory_class(type(whole))
    for module in pruned.modules():
        if "name_or_path" in vars(module):  # adapters would be saved for the model before pruning
            module.name_or_path = module.config.name_or_path
    source: Any = whole
    places = {f"{path}.{part}".strip("."): device for part, device in device_map.items()}
    copy_weights(source, twin, places, share=share)
    if len(set(device_map.values())) > 1 or any(p.is_meta for p in model.parameters()):
        pruned.tie_weights()  # placing the weights has broken the ties
    return twin.eval()


def _copy_configs(whole: nn.Module, model: Any, architecture: Architecture, memo: Memo) -> None:
    """Puts the pruned model's config in the place of the model's, wherever modules refer to it."""
    types = (architecture.model_type, architecture.pruned_type)
    memo[id(model.config)] = made = _uneven_config(model, sublayers(model, architecture))
    for module in whole.modules():
        for config in vars(module).values():
            if isinstance(config, PretrainedConfig) and id(config) not in memo:
                same = config.model_type in types and config.to_dict() == model.config.to_dict()
                memo[id(config)] = made if same else copy.deepcopy(config)


def _uneven_config(model: Any, units: Sequence[SubLayer]) -> Any:
    """Returns the config of a model's pruned copy, with all units that the model has."""
    given = model.config
    kind = uneven_config_class(type(given), find_architecture(model))
    settings = plain_values(given)
    rows = _rows(given, units)
    if len(rows) != given.num_hidden_layers:
        settings[given.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(rows)
        if isinstance(settings.get("layer_types"), list):
            settings["layer_types"] = settings["layer_types"][: len(rows)]
        if "stage_names" in settings:
            for name in ("stage_names", "out_features", "out_indices"):
                settings.pop(name, None)
    if settings.get("output_attentions") and given._attn_implementation not in ("eager", None):
        settings["output_attentions"] = False  # transformers would refuse to save it
    config = kind(**settings)
    store_kept_units(config, rows)
    config._attn_implementation = given._attn_implementation
    return config


def _rows(config: Any, units: Sequence[SubLayer]) -> list[KeptUnits]:
    """Returns the units of each layer, which may be fewer than the config says."""
    stored = kept_units(config)
    rows = []
    for attention, ffn in zip(units[::2], units[1::2], strict=True):
        row = stored[min(attention.layer, len(stored) - 1)]
        for sublayer, own, name in ((attention, row.heads, "heads"), (ffn, row.neurons, "neurons")):
            if sublayer.units > len(own):
                raise ValueError(
                    f"The layer of {sublayer.name} has {sublayer.units} {name}, but the model's config "
                    f"says {len(own)}. Set the config to the sizes that the model has."
                )
        rows.append(KeptUnits(row.heads[: attention.units], row.neurons[: ffn.units]))
    return rows


def head_options(model: Any) -> dict[str, Any]:
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


def become_plain(whole: nn.Module, pruned: Any) -> None:
    """Gives a pruned model the class and config of transformers that describe it, in place.

    Args:
        whole: The module that it is in, or itself: all in it that refer to its config are told.
        pruned: The pruned model, with the same sizes in all layers, which are recorded in its config.

    Raises:
        ValueError: If the family's config cannot describe the model.
    """
    before, architecture = pruned.config, find_architecture(pruned)
    settings = plain_settings(before)
    kind = dense_config_class(type(before), architecture)
    if settings is None:
        raise ValueError(
            f"A plain {kind.__name__} cannot describe the sizes of this model's layers, which its "
            "field 'kprune' lists. Prune with layout='free'."
        )
    config = kind(**(plain_values(before) | settings))
    config._attn_implementation = before._attn_implementation
    for module in whole.modules():
        for name, value in vars(module).items():
            if value is before:
                vars(module)[name] = config
    for module in pruned.modules():
        if module is not pruned and isinstance(module, UnevenLayers):
            module.__class__ = dense_class(type(module))
        family_class(module)
    own = dense_class(type(pruned))
    pruned.__class__ = plain_class(own)
    config.architectures = [pruned.kprune_stock or own.__name__]
