"""DeciLM checkpoints: what a loader with vLLM's arithmetic makes of them is the model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from kprune_ext.export import export_deci
from kprune_ext.export.deci_config import MULTIPLE, ffn_mult, neurons_of
from tests.helpers.deci import Deci
from tests.helpers.gguf import byte_level
from tests.helpers.kprune_decoders import cut, tiny_decoder

BIASED = "llama with biases and heads of another size"
SHAPES: dict[str, list[tuple[list[int], list[int]]]] = {
    "equal": [([0, 2], [0, 3, 4])] * 3,
    "neurons": [([0, 2], [0, 3, 4]), ([1, 2], [5]), ([0, 1], list(range(9)))],
    "attention missing": [([0, 2], [0, 3, 4]), ([], [5]), ([0, 1], list(range(9)))],
    "no neurons": [([0, 2], []), ([1, 2], [5]), ([0, 1], [])],
    "no heads first": [([], [0, 3, 4]), ([1, 2], [5]), ([], [])],
    "no heads": [([], [0, 3, 4])] * 3,
}
UNEVEN = [([0, 2], [0, 3]), ([1], [5]), ([0, 1, 2], [4])]


@torch.no_grad()
def apart(model: Any, folder: Path, tokens: int = 14) -> float:
    ids = torch.randint(3, model.config.vocab_size, (1, tokens))
    expected = model.double()(ids).logits[0]
    found = Deci(folder).logits(ids[0])
    return float((found - expected).abs().max() / expected.abs().max())


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("family", ["llama", BIASED, "mistral", "qwen2"])
@pytest.mark.parametrize("kept", [None, *SHAPES])
def test_predictions(family: str, kept: str | None, tmp_path: Path) -> None:
    model = tiny_decoder(family)
    model = model if kept is None else cut(model, SHAPES[kept])
    export_deci(model, tmp_path / "deci")
    window = model.config.sliding_window if family in ("mistral", "qwen2") else None
    assert config_of(tmp_path / "deci")["max_position_embeddings"] == (window or 64)
    assert apart(model, tmp_path / "deci", window or 14) < 1e-5


def test_the_config(tmp_path: Path) -> None:
    model = cut(tiny_decoder("llama"), SHAPES["attention missing"])
    export_deci(model, tmp_path / "deci")
    config = config_of(tmp_path / "deci")
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert (config["num_attention_heads"], config["head_dim"]) == (4, 4)
    assert config["block_configs"] == [
        {
            "attention": {
                "n_heads_in_group": group,
                "no_op": not group,
                "replace_with_linear": False,
            },
            "ffn": {"no_op": False, "replace_with_linear": False, "intermediate_size": neurons},
        }
        for group, neurons in ((2, 3), (None, 1), (2, 9))
    ]
    loaded: Any = AutoConfig.from_pretrained(tmp_path / "deci", trust_remote_code=True)
    assert loaded.block_configs[1].attention.no_op
    assert not hasattr(loaded.block_configs[0].ffn, "ffn_mult")
    loaded.save_pretrained(tmp_path / "again")
    again = config_of(tmp_path / "again")
    assert [b["ffn"]["intermediate_size"] for b in again["block_configs"]] == [3, 1, 9]


def test_multiples_of_256_have_a_factor(tmp_path: Path) -> None:
    """So that loaders read them which know `ffn_mult` alone."""
    kept = [([0, 1, 2], list(range(256))), ([0, 1, 2], []), ([0, 1, 2], list(range(512)))]
    model = cut(tiny_decoder("llama", intermediate_size=600), kept)
    export_deci(model, tmp_path / "deci")
    blocks = config_of(tmp_path / "deci")["block_configs"]
    assert [b["ffn"]["intermediate_size"] for b in blocks] == [256, None, 512]
    assert blocks[1]["ffn"]["ffn_mult"] is None and blocks[1]["ffn"]["no_op"]
    assert [neurons_of(blocks[n]["ffn"]["ffn_mult"], 24) for n in (0, 2)] == [256, 512]
    assert apart(model, tmp_path / "deci") < 1e-5


@pytest.mark.parametrize("hidden", [24, 576, 768, 2048, 4096, 5120, 8192, 16384])
def test_factors_lead_back_to_the_neurons(hidden: int) -> None:
    for count in range(1, 200):
        assert neurons_of(ffn_mult(count * MULTIPLE, hidden), hidden) == count * MULTIPLE


def test_uneven_heads_are_refused_or_filled_up(tmp_path: Path) -> None:
    model = cut(tiny_decoder("llama"), UNEVEN)
    with pytest.raises(ValueError, match=r"layers 0, 1 have fewer than the 6 heads.*pad=True"):
        export_deci(model, tmp_path / "deci")
    assert not (tmp_path / "deci").exists()
    export_deci(model, tmp_path / "deci", pad=True)
    assert config_of(tmp_path / "deci")["num_attention_heads"] == 6
    assert apart(model, tmp_path / "deci") < 1e-5


def test_other_families_are_refused(tmp_path: Path) -> None:
    for family in ("qwen3", "gemma", "gemma3"):
        with pytest.raises(ValueError, match="cannot be written as DeciLMForCausalLM.*'uniform'"):
            export_deci(tiny_decoder(family), tmp_path / "deci")
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        export_deci(tiny_decoder("llama", hidden_act="gelu"), tmp_path / "deci")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [True, False])
def test_from_a_folder_in_shards(tied: bool, tmp_path: Path) -> None:
    tokenizer = byte_level()
    options = {"vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    model = cut(tiny_decoder("llama", **options), SHAPES["neurons"])
    model.save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    export_deci(tmp_path / "pruned", tmp_path / "deci", max_shard_size="20KB")
    index = json.loads((tmp_path / "deci" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "deci").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 1
    assert apart(model, tmp_path / "deci") < 1e-5
    again = AutoTokenizer.from_pretrained(tmp_path / "deci", trust_remote_code=True)
    assert again("the fox").input_ids == tokenizer("the fox").input_ids
    assert "kprune" not in config_of(tmp_path / "deci")
    assert (tmp_path / "deci" / "generation_config.json").is_file()


def test_dtype_and_windows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_decoder("mistral")
    with caplog.at_level(logging.WARNING):
        export_deci(model, tmp_path / "deci", dtype="bfloat16")
    assert "see at most the last 5 tokens" in caplog.text
    assert config_of(tmp_path / "deci")["torch_dtype"] == "bfloat16"
    stored = Deci(tmp_path / "deci").weights["model.norm.weight"]
    expected = model.state_dict()["model.norm.weight"].bfloat16().double()
    assert torch.equal(stored, expected)
