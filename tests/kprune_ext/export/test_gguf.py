"""GGUF files of every family: what llama.cpp's graphs compute from them is what the model predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kprune_ext.architectures.llama_cpp import LLAMA_CPP
from kprune_ext.export import export_gguf
from tests.helpers.gguf import byte_level, fields, sentencepiece, tensors
from tests.helpers.gguf_graph import Graph
from tests.helpers.kprune_decoders import CUTS, DECODERS, cut, tiny_decoder

FAMILIES = [family for family, (kind, _, _) in DECODERS.items() if kind in LLAMA_CPP]
EVEN = [([0, 2], [0, 3, 4, 5, 7, 8])] * 3
SHAPES: dict[str, list[tuple[list[int], list[int]]]] = CUTS | {"equal": EVEN}
#: Families that llama.cpp has no sizes per layer for.
GEMMA = ("gemma", "gemma2", "gemma3")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level()


def model_of(family: str, kept: str | None, rows: int, **options: Any) -> Any:
    model = tiny_decoder(family, vocab_size=rows, **options)
    return model if kept is None else cut(model, SHAPES[kept])


def ids(rows: int, tokens: int = 14) -> torch.Tensor:
    return torch.randint(3, rows, (1, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def apart(model: Any, path: Path, tokens: int) -> float:
    """The greatest difference of logits, relative to their size, for a text of so many tokens."""
    text = ids(model.config.vocab_size, tokens)
    model.set_attn_implementation("eager")  # others may leave out the caps of Gemma 2
    expected = model.double()(text).logits[0]
    found = Graph(path).logits(text[0])
    return float((found - expected).abs().max() / expected.abs().max())


def test_every_family_is_tried() -> None:
    assert {DECODERS[family][0] for family in FAMILIES} == set(LLAMA_CPP)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [None, *SHAPES])
def test_predictions(family: str, kept: str | None, tmp_path: Path, tokenizer: Any) -> None:
    model = model_of(family, kept, len(tokenizer))
    path = tmp_path / "model.gguf"
    uneven = kept in CUTS
    export_gguf(model, path, tokenizer, dtype="float32", pad=uneven and family in GEMMA)
    length = fields(path)[f"{fields(path)['general.architecture']}.context_length"]
    window = model.config.sliding_window if family in ("mistral", "qwen2") else None
    assert length == (window or 64)
    assert apart(model, path, min(length, 14)) < 1e-5


@pytest.mark.parametrize(
    ("family", "kept", "architecture"),
    [
        ("llama", None, "llama"),
        ("llama", "equal", "llama"),
        ("llama", "some", "deci"),
        ("mistral", "some", "deci"),
        ("qwen2", None, "qwen2"),
        ("qwen2", "equal", "llama"),
        ("qwen2", "some", "deci"),
        ("qwen3", "equal", "qwen3"),
        ("qwen3", "some", "openelm"),
    ],
)
def test_architecture(
    family: str, kept: str | None, architecture: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(model_of(family, kept, len(tokenizer)), path, tokenizer)
    keys = fields(path)
    assert keys["general.architecture"] == architecture
    listed = isinstance(keys[f"{architecture}.attention.head_count"], list)
    assert listed is (kept == "some")
    if kept == "some":
        assert keys[f"{architecture}.attention.head_count_kv"] == [2, 1, 3]
        assert keys[f"{architecture}.attention.head_count"] == [4, 2, 6]
        assert keys[f"{architecture}.feed_forward_length"] == [5, 3, 7]


def test_missing_parts_of_deci(tmp_path: Path, tokenizer: Any) -> None:
    """Attention may be missing but in the first layer; a layer without neurons keeps one of zeros."""
    path = tmp_path / "model.gguf"
    export_gguf(model_of("llama", "neither", len(tokenizer)), path, tokenizer)
    keys, stored = fields(path), tensors(path)
    assert keys["deci.attention.head_count_kv"] == [1, 2, 0]
    assert keys["deci.feed_forward_length"] == [1, 3, 1]
    assert not [name for name in stored if name.startswith("blk.2.attn")]
    assert not stored["blk.0.attn_q.weight"].any() and not stored["blk.2.ffn_down.weight"].any()


def test_a_bias_keeps_its_layers_attention(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "model.gguf"
    family = "llama with biases and heads of another size"
    model = model_of(family, "neither", len(tokenizer))
    export_gguf(model, path, tokenizer)
    assert fields(path)["deci.attention.head_count_kv"] == [1, 2, 1]
    assert apart(model, path, 9) < 1e-5


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_scaled_positions(scaling: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "model.gguf"
    options = {"rope_theta": 50.0, "rope_scaling": scaling}
    model = model_of("llama", "some", len(tokenizer), **options)
    export_gguf(model, path, tokenizer)
    assert apart(model, path, 30) < 1e-5


def test_attention_scaled_by_another_number(tmp_path: Path, tokenizer: Any) -> None:
    for family in ("gemma2", "gemma3"):
        path = tmp_path / f"{family}.gguf"
        model = model_of(family, "equal", len(tokenizer), query_pre_attn_scalar=7)
        export_gguf(model, path, tokenizer)
        assert apart(model, path, 12) < 1e-5


def test_separate_head(tmp_path: Path, tokenizer: Any) -> None:
    for tied in (False, True):
        path = tmp_path / f"{tied}.gguf"
        model = model_of("llama", "some", len(tokenizer), tie_word_embeddings=tied)
        export_gguf(model, path, tokenizer)
        assert ("output.weight" in tensors(path)) is not tied
        assert apart(model, path, 12) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(dtype: str, tmp_path: Path, tokenizer: Any) -> None:
    model = model_of("llama", "some", len(tokenizer))
    path = tmp_path / "model.gguf"
    export_gguf(model, path, tokenizer, dtype=dtype)  # type: ignore[arg-type]
    stored = tensors(path)
    weight = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    expected = weight.to(getattr(torch, dtype)).float().numpy()
    assert (stored["blk.1.ffn_up.weight"] == expected).all()
    norm = model.state_dict()["model.norm.weight"].numpy()
    assert (stored["output_norm.weight"] == norm).all()  # vectors stay in float32
    export_gguf(model.to(getattr(torch, dtype)), path, tokenizer, overwrite=True)
    assert (tensors(path)["blk.1.ffn_up.weight"] == expected).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_transformers_loads_equal_layers(family: str, tmp_path: Path, tokenizer: Any) -> None:
    """It reads the same files, where it knows the architecture and the sizes are its own."""
    options: dict[str, Any] = {"qwen3": {"head_dim": 128}}.get(family, {})
    if family == "qwen2":
        options = {"use_sliding_window": False}
    kept = [([0, 1, 2], [0, 3, 4, 5, 7, 8])] * 3 if family == "qwen2" else EVEN
    model = cut(tiny_decoder(family, vocab_size=len(tokenizer), **options), kept)
    export_gguf(model, tmp_path / "model.gguf", tokenizer, dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    if family.startswith("gemma"):  # which the file has no keys for
        loaded.config.query_pre_attn_scalar = 10
        for layer in loaded.model.layers:
            layer.self_attn.scaling = 10**-0.5
    assert not isinstance(loaded.config, type(model.config)) and "kprune" not in vars(loaded.config)
    text = ids(len(tokenizer))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded(text).logits, model(text).logits, rtol=1e-4, atol=1e-4)
    if family.startswith("gemma"):  # whose tokenizers transformers takes to be of another kind
        return
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    words = {"text": "the quick fox", "add_special_tokens": False}
    assert again(**words).input_ids == tokenizer(**words).input_ids


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_from_a_folder(shards: str, tmp_path: Path, tokenizer: Any) -> None:
    model = model_of("llama", "some", len(tokenizer))
    model.save_pretrained(tmp_path / "pruned", max_shard_size=shards)
    tokenizer.save_pretrained(tmp_path / "pruned")
    export_gguf(tmp_path / "pruned", tmp_path / "folder.gguf")
    export_gguf(model, tmp_path / "memory.gguf", tokenizer, name="pruned")
    assert (tmp_path / "folder.gguf").read_bytes() == (tmp_path / "memory.gguf").read_bytes()
    assert fields(tmp_path / "folder.gguf")["general.name"] == "pruned"


def test_an_ordinary_checkpoint_with_fewer_heads(tmp_path: Path, tokenizer: Any) -> None:
    """As layout="uniform" may save it: a config of the family itself, and sizes of its own."""
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    model = tiny_decoder("llama", vocab_size=len(tokenizer), intermediate_size=9, **options)
    model.save_pretrained(tmp_path / "plain")
    export_gguf(tmp_path / "plain", tmp_path / "model.gguf", tokenizer)
    assert fields(tmp_path / "model.gguf")["llama.attention.head_count"] == 4
    assert apart(model, tmp_path / "model.gguf", 12) < 1e-5


def test_sentencepiece_file(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    path = tmp_path / "model.gguf"
    export_gguf(model_of("mistral", "some", len(tokenizer) + 5), path, tokenizer)
    keys = fields(path)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert len(keys["tokenizer.ggml.tokens"]) == len(tokenizer) + 5
