"""Sizes of a pruned model's layers in the form of transformers' own configs: `per_layer_config`.

No model of the supported families reads that field yet. It is written beside the field `kprune`, for
programs that do, and left out when a config is read, as transformers then no longer tells the sizes
before pruning.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..architectures.row import Architecture
from .grouped_query import attention_sizes
from .kept import kept_units
from .sublayers import layers_path

FIELD = "per_layer_config"


class PrunedConfig:
    """Mixin of the config classes of pruned families."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Returns the config, as transformers does, from all fields but `per_layer_config`."""
        fields = {name: value for name, value in config_dict.items() if name != "per_layer_config"}
        return super().from_dict(fields, **kwargs)  # type: ignore[misc]


class RegisteredConfig(PrunedConfig):
    """Mixin of the config classes that this package registers with transformers."""

    @property
    def auto_map(self) -> dict[str, str]:
        """Classes in files beside the model, none by default. TRL reads it of every unknown class."""
        found: dict[str, str] = vars(self).get("auto_map", {})
        return found

    @auto_map.setter
    def auto_map(self, classes: dict[str, str]) -> None:
        vars(self)["auto_map"] = classes


def per_layer_settings(model: Any, row: Architecture) -> dict[str, Any]:
    """Returns the field `per_layer_config` of a pruned model's saved config.

    Layers name only the settings in which they differ from the config, and those that the config does
    not have, such as BERT's head size, in every layer. A sub-layer without units is named in `skip`.

    Args:
        model: The pruned model.
        row: Table row of its family.

    Returns:
        The field by its name. It is left out where all layers are as the config says, or where a
        sub-layer without units still adds its bias, which the form cannot say.
    """
    config = model.config
    kept, (groups, queries, size) = kept_units(config), attention_sizes(config)
    neurons = row.neurons(config)
    width = row.neurons_setting if row.neuron_choices is None else "intermediate_size"
    heads_differ = any(len(units.heads) not in (0, groups) for units in kept)
    widths_differ = any(len(units.neurons) not in (0, neurons) for units in kept)
    layers: dict[str, dict[str, Any]] = {}
    for number, units in enumerate(kept):
        skip = [("attention", not units.heads), ("mlp", not units.neurons)]
        settings: dict[str, Any] = {}
        if heads_differ and (units.heads or not hasattr(config, "head_dim")):
            found = {"num_attention_heads": len(units.heads) * queries, "head_dim": size}
            if hasattr(config, "num_key_value_heads"):
                found["num_key_value_heads"] = len(units.heads)
            settings |= found
        if widths_differ and (units.neurons or not hasattr(config, width)):
            settings[width] = len(units.neurons)
        settings = {
            config.attribute_map.get(name, name): value
            for name, value in settings.items()
            if getattr(config, name, None) != value
        }
        if any(gone for _, gone in skip):
            if _adds_bias(model, row, number, not units.heads, not units.neurons):
                return {}
            settings["skip"] = [name for name, gone in skip if gone]
        if settings:
            layers[str(number).zfill(len(str(len(kept) - 1)))] = settings
    return {FIELD: layers} if layers else {}


def _adds_bias(model: nn.Module, row: Architecture, number: int, *empty: bool) -> bool:
    """Whether one of a layer's empty sub-layers, attention and feed-forward, adds a bias."""
    made: Any = model
    layer = list(model.get_submodule(layers_path(made, row)).children())[number]
    names = {name for name, _ in layer.named_modules()}
    for variants, is_empty in zip((row.attention, row.ffn), empty, strict=True):
        outputs = [paths.output for paths in variants if paths.output in names]
        if is_empty and getattr(layer.get_submodule(outputs[0]), "bias", None) is not None:
            return True
    return False
