"""The sizes of uneven layers in the form of transformers' own configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kprune_ext.units.kept import kept_units
from kprune_ext.units.per_layer import per_layer_settings
from kprune_ext.units.plain import plain_values
from tests.helpers.kprune import tiny_bert
from tests.helpers.kprune_checkpoints import equal_cut
from tests.helpers.kprune_decoders import CUTS, DECODERS, cut, tiny_decoder

IS_READ = hasattr(PretrainedConfig, "per_layer_config")


def written(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()).get("per_layer_config")


def read_by_transformers(config: Any, field: Any) -> Any:
    dense = CONFIG_MAPPING[config.model_type.removeprefix("kprune_ext_")]
    # Checks of Llama's config and a few others still ask for one number of heads.
    options = {"allow_global_per_layer_attribute_access": True, "per_layer_config": field}
    return dense(**plain_values(config), **options).per_layer_config


@pytest.mark.parametrize("family", DECODERS)
def test_transformers_reads_the_sizes_of_the_layers(family: str, tmp_path: Path) -> None:
    pruned = cut(tiny_decoder(family), CUTS["some"])
    field = written(pruned, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict().get("per_layer_config") is None
    if not IS_READ:
        return
    queries = pruned.config.num_attention_heads // 3
    layers = read_by_transformers(pruned.config, field)
    for layer, units in zip(layers, kept_units(pruned.config), strict=True):
        assert layer.num_attention_heads == len(units.heads) * queries
        neurons = {"gpt2": "n_inner", "opt": "ffn_dim"}.get(family[:4].strip(), "intermediate_size")
        assert getattr(layer, neurons) == len(units.neurons)
        if hasattr(pruned.config, "num_key_value_heads"):
            assert layer.num_key_value_heads == len(units.heads)
        size = getattr(pruned.config, "head_dim", None) or 24 // pruned.config.num_attention_heads
        assert layer.head_dim == size


def test_sub_layers_without_units_are_skipped(tmp_path: Path) -> None:
    pruned = cut(tiny_decoder("llama"), CUTS["neither"])
    assert written(pruned, tmp_path) == {
        "0": {"skip": ["attention", "mlp"]},
        "1": {"intermediate_size": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
        "2": {"skip": ["attention", "mlp"]},
    }


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama with biases and heads of another size"])
def test_what_the_form_cannot_say_is_left_out(family: str, tmp_path: Path) -> None:
    """A sub-layer without units still adds the bias of its output projection."""
    assert written(cut(tiny_decoder(family), CUTS["neither"]), tmp_path) is None


def test_layers_as_the_config_says_need_no_field(tmp_path: Path) -> None:
    whole = [([0, 1, 2], list(range(20)))] * 3
    assert written(cut(tiny_decoder("qwen2"), whole), tmp_path / "whole") is None
    assert written(equal_cut(tiny_decoder("qwen2")), tmp_path / "uniform") is None


def test_encoders_name_the_head_size_that_their_config_does_not(tmp_path: Path) -> None:
    pruned = cut(tiny_bert(), [([0, 1], [0, 1, 2]), ([0, 1, 2, 3], list(range(40)))])
    field = per_layer_settings(pruned, pruned.kprune_row)["per_layer_config"]
    assert field == {
        "0": {"head_dim": 6, "intermediate_size": 3, "num_attention_heads": 2},
        "1": {"head_dim": 6},
    }
    assert written(pruned, tmp_path) == field
    if IS_READ:
        layers = read_by_transformers(pruned.config, field)
        assert [layer.num_attention_heads for layer in layers] == [2, 4]
