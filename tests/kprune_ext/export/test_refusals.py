"""What cannot be exported is refused before any work, and files that exist are kept."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from kprune_ext.export import export_deci, export_gguf
from tests.helpers.gguf import byte_level
from tests.helpers.kprune_decoders import CUTS, cut, tiny_decoder
from tests.helpers.kprune_models import tiny


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return cut(tiny_decoder("llama", vocab_size=len(tokenizer)), CUTS["some"])


@pytest.fixture
def folder(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def refused(message: str, error: type[Exception] = ValueError) -> Any:
    return pytest.raises(error, match=message)


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_uneven_layers_without_a_graph(tmp_path: Path, tokenizer: Any) -> None:
    gemma = cut(tiny_decoder("gemma", vocab_size=len(tokenizer)), CUTS["some"])
    with refused("layers 1, 2 differ from layer 0.*layout='uniform'.*pad=True"):
        export_gguf(gemma, tmp_path / "model.gguf", tokenizer)
    untied = tiny_decoder("qwen3", vocab_size=len(tokenizer), tie_word_embeddings=False)
    with refused("'openelm': its output projection is always the embedding.*pad=True"):
        export_gguf(cut(untied, CUTS["some"]), tmp_path / "model.gguf", tokenizer)
    assert not entries(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3"])
def test_other_families(family: str, tmp_path: Path, tokenizer: Any) -> None:
    with refused("not a causal language model|cannot be written as GGUF here"):
        export_gguf(tiny_decoder(family), tmp_path / "model.gguf", tokenizer)
    assert not entries(tmp_path)


def test_models_of_other_kinds(tmp_path: Path, tokenizer: Any, folder: Path) -> None:
    path = tmp_path / "model.gguf"
    with refused("of the model type 'bert', which kprune_ext does not export"):
        export_gguf(tiny("bert"), path, tokenizer)
    classifier = tiny_decoder("llama", "sequence", vocab_size=len(tokenizer))
    for kind in (classifier, classifier.model):
        with refused("is not a causal language model"):
            export_gguf(kind, path, tokenizer)
    with refused("Linear is not a model of transformers.*merge_and_unload"):
        export_gguf(nn.Linear(2, 2), path, tokenizer)  # type: ignore[arg-type]
    tied = tiny_decoder("qwen3", vocab_size=len(tokenizer))
    tied.model.layers[0].extra = nn.Linear(2, 2)
    with refused("no place in the export, such as model.layers.0.extra.bias"):
        export_gguf(tied, path, tokenizer)
    assert entries(tmp_path) == ["pruned"]


def test_adapters_and_quantised_weights(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "model.gguf"
    adapted = tiny_decoder("llama", vocab_size=len(tokenizer))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), adapted)
    with refused(r"has an adapter, such as .*merge it \(merge_and_unload\) first"):
        export_gguf(adapted, path, tokenizer)
    quantised = tiny_decoder("llama", vocab_size=len(tokenizer))
    weight = torch.zeros(20, 24, dtype=torch.int8)
    quantised.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)
    for export in (export_gguf, export_deci):
        with refused(r"has quantised weights, such as .*up_proj.weight.*dequantize\(\)"):
            export(quantised, path, tokenizer)
    huge = tiny_decoder("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        huge.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with refused("too large for float16. Pass dtype='bfloat16' or 'float32'"):
        export_gguf(huge, path, tokenizer, dtype="float16")
    assert not entries(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "relu"}, "does not compute the activation 'relu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "kind 'dynamic'"),
    ],
)
def test_settings(options: Any, message: str, tmp_path: Path, tokenizer: Any) -> None:
    given = tiny_decoder("llama", vocab_size=len(tokenizer), **options)
    with refused(message):
        export_gguf(given, tmp_path / "model.gguf", tokenizer)
    assert not entries(tmp_path)


def test_weights_that_do_not_fit_the_config(
    tmp_path: Path, tokenizer: Any, folder: Path, model: Any
) -> None:
    wrong = tiny_decoder("llama", vocab_size=len(tokenizer))
    wrong.model.layers[1].mlp.up_proj = nn.Linear(24, 5, bias=False)
    with refused(r"layers.1.mlp.up_proj.weight has the shape \(5, 24\), where \(20, 24\)"):
        export_gguf(wrong, tmp_path / "model.gguf", tokenizer)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with refused("model.safetensors in .* is damaged"):
        export_gguf(folder, tmp_path / "model.gguf")
    (folder / "model.safetensors").unlink()
    with refused("has no model.safetensors. Other files, such as pickles"):
        export_gguf(folder, tmp_path / "model.gguf")
    for text, message in (
        ("{", "is not an index of weights"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "is no safetensors file of the"),
        ('{"weight_map": {"a": "model.bin"}}', "is no safetensors file of the"),
    ):
        (folder / "model.safetensors.index.json").write_text(text)
        with refused(message):
            export_gguf(folder, tmp_path / "model.gguf")
    assert entries(tmp_path) == ["pruned"]


def test_offloaded_weights(tmp_path: Path, tokenizer: Any) -> None:
    away = tiny_decoder("llama", vocab_size=len(tokenizer))
    away.model.layers[2].to("meta")
    with refused("offloaded weights, such as model.layers.2.*Save it, and export the folder"):
        export_gguf(away, tmp_path / "model.gguf", tokenizer)


def test_tokenizers(tmp_path: Path, tokenizer: Any, model: Any, folder: Path) -> None:
    path = tmp_path / "model.gguf"
    with refused("A model in memory has no tokenizer"):
        export_gguf(model, path)
    export_gguf(model, path, folder)  # by its folder
    assert path.stat().st_size
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with refused("no tokenizer in .* that can be loaded"):
        export_gguf(folder, tmp_path / "other.gguf")
    with refused("dtype='int8' is not supported.*llama-quantize"):
        export_gguf(model, tmp_path / "other.gguf", tokenizer, dtype="int8")  # type: ignore[arg-type]
    assert entries(tmp_path) == ["model.gguf", "pruned"]


def test_nothing_is_overwritten_without_being_asked(
    tmp_path: Path, tokenizer: Any, model: Any, folder: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    with refused("exists. Pass another path, or overwrite=True", FileExistsError):
        export_gguf(model, path, tokenizer)
    assert path.read_text() == "mine"
    with refused("which would be overwritten"):
        export_gguf(folder, folder / "model.safetensors", overwrite=True)
    with refused("is a folder"):
        export_gguf(model, folder, tokenizer)
    with refused("holds other files"):
        export_deci(model, folder)
    export_gguf(model, path, tokenizer, overwrite=True)
    assert path.read_bytes()[:4] == b"GGUF"


def test_a_failed_export_leaves_the_old_file(
    tmp_path: Path, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    calls = []

    def failing(tensor: torch.Tensor, shape: Any) -> torch.Tensor:
        calls.append(shape)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return tensor

    monkeypatch.setattr("kprune_ext.export.tensors.padded", failing)
    with refused("No space left on device", OSError):
        export_gguf(folder, path, tokenizer, overwrite=True)
    assert path.read_text() == "mine" and entries(tmp_path) == ["model.gguf", "pruned"]
    monkeypatch.setattr("kprune_ext.export.deci.padded", failing)
    with refused("No space left on device", OSError):
        export_deci(folder, tmp_path / "deci", pad=True)
    assert not (tmp_path / "deci").exists()


def test_without_the_package(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'")
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    shutil.rmtree(folder)  # not even the model is looked at
    with refused(r"needs the package gguf.*pip install 'peft-corda\[gguf\]'", ImportError):
        export_gguf(folder, tmp_path / "model.gguf")


def test_a_classifiers_folder(tmp_path: Path, tokenizer: Any) -> None:
    tiny_decoder("llama", "sequence", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "c")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "c")
    with refused("is not a causal language model"):
        export_gguf(tmp_path / "c", tmp_path / "model.gguf", tokenizer)
