"""Decoders that cannot be pruned: what is said of each, and what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kprune_ext import KPruneConfig, kprune
from kprune_ext.architectures.table import find_architecture
from kprune_ext.units.kept import kept_units
from tests.helpers.kprune_decoders import decoder_batches, tiny_decoder

_SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}


def _model(kind: str, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_SIZES | settings))


@pytest.mark.parametrize("kind", ["gpt_neox", "falcon", "phi", "cohere"])
def test_parallel_blocks(kind: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"{kind}.*run in parallel.*Prune a model whose sub-layers follow.*llama.*Supported enc",
    ):
        kprune(_model(kind), decoder_batches(4))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_mixtures_of_experts(kind: str) -> None:
    model = _model(kind, moe_intermediate_size=16, shared_expert_intermediate_size=16, **_EXPERTS)
    with pytest.raises(ValueError, match=rf"{kind}.*mixtures of experts.*Prune a dense model"):
        kprune(model, decoder_batches(4))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mamba", {"state_size": 4}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("recurrent_gemma", {"lru_width": 16, "attention_window_size": 8}),
    ],
)
def test_layers_without_softmax_attention(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{kind}.*linear attention.*softmax attention in every"):
        kprune(_model(kind, **settings), decoder_batches(4))


@pytest.mark.parametrize("kind", ["olmo2", "starcoder2"])
def test_other_families_are_told_how_to_be_added(kind: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{kind}.*no row in kprune_ext/architectures/decoders.py"
    ):
        kprune(_model(kind), decoder_batches(4))


def test_cross_attention_is_refused() -> None:
    model = tiny_decoder("gpt2", add_cross_attention=True)
    with pytest.raises(ValueError, match="cross-attention to an encoder"):
        kprune(model, decoder_batches(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 4}, "6 attention heads do not divide into 4 groups"),
        ({"num_key_value_heads": -1}, "its num_key_value_heads is -1"),
        ({"head_dim": "many"}, "its head_dim is many"),
        ({"num_key_value_heads": 2**40}, "its num_key_value_heads is 1099511627776"),
    ],
)
def test_a_config_of_impossible_attention(change: dict[str, Any], message: str) -> None:
    model = tiny_decoder("llama")
    for name, value in change.items():
        vars(model.config)[name] = value
    with pytest.raises(ValueError, match=f"The config describes attention.*{message}.*Restore"):
        kept_units(model.config)


def test_a_pruned_decoder_whose_projections_were_replaced_is_refused() -> None:
    model = tiny_decoder("gpt2")
    model.transformer.h[1].mlp.c_fc = torch.nn.Identity()
    with pytest.raises(TypeError, match=r"transformer\.h\.1\.mlp\.c_fc is a torch.*Identity"):
        kprune(model, decoder_batches(4), KPruneConfig(reduction=0.2))
    assert find_architecture(model).model_type == "gpt2"
