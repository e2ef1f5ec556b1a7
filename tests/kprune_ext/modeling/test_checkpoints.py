"""Checkpoints of pruned models: whole or not there, sharded, damaged."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM

from kprune_ext import kprune
from kprune_ext.checkpoint_files import replacing_files as saving
from kprune_ext.checkpoint_files import saved
from tests.helpers.kprune import padded, sequences
from tests.helpers.kprune_checkpoints import batch, contents, load
from tests.helpers.kprune_models import outputs_of, tiny

IN_BOTH_LAYOUTS = pytest.mark.parametrize("layout", ["free", "uniform"], indirect=True)


@IN_BOTH_LAYOUTS
def test_a_failing_save_leaves_the_previous_checkpoint(pruned, tmp_path, monkeypatch) -> None:
    pruned.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    bias = pruned.classifier.bias.detach().clone()
    with torch.no_grad():
        pruned.classifier.bias += 1
    try:
        with monkeypatch.context() as patch:
            patch.setattr(saved, "card_text", _full_disk)  # after the weights are written
            with pytest.raises(OSError, match="no space"):
                pruned.save_pretrained(tmp_path)
        assert contents(tmp_path) == before
        with monkeypatch.context() as patch:
            replace, calls = os.replace, []

            def failing(source: Any, target: Any) -> None:
                calls.append(target)
                if len(calls) == 3:
                    _full_disk()
                replace(source, target)

            patch.setattr(saving.os, "replace", failing)
            with pytest.raises(OSError, match="no space"):
                pruned.save_pretrained(tmp_path, max_shard_size="8KB", self_contained=True)
        assert contents(tmp_path) == before
        with monkeypatch.context() as patch:
            patch.setattr(saved, "card_text", _full_disk)
            with pytest.raises(OSError, match="no space"):
                pruned.save_pretrained(tmp_path / "new" / "folder")
        assert not (tmp_path / "new").exists()
    finally:
        with torch.no_grad():
            pruned.classifier.bias.copy_(bias)


def _full_disk(*_: Any) -> None:
    raise OSError("no space left on device")


def test_files_that_cannot_be_put_back_are_not_deleted(tmp_path, monkeypatch) -> None:
    for name in ("a.json", "b.json", "c.json"):
        (tmp_path / name).write_text(f"old {name}")
    before, replace = contents(tmp_path), os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(source).name != "a.json" or Path(source).parent.name == "old":
            _full_disk()
        replace(source, target)

    monkeypatch.setattr(saving.os, "replace", failing)
    with (
        pytest.raises(OSError, match="nor put back all files .* Move it back") as caught,
        saving.replacing_files(tmp_path) as new,
    ):
        for name in ("a.json", "b.json"):
            (new / name).write_text("new")
    (rescued,) = tmp_path.glob("previous-files-*")
    assert str(rescued) in str(caught.value)
    monkeypatch.undo()
    for path in rescued.iterdir():
        os.replace(path, tmp_path / path.name)
    shutil.rmtree(rescued)  # a second link to a file is not moved
    assert contents(tmp_path) == before


@IN_BOTH_LAYOUTS
def test_a_killed_save_leaves_the_previous_checkpoint(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path)
    before = contents(tmp_path)
    script = """
import sys, time
import kprune_ext
from kprune_ext.checkpoint_files import saved
from kprune_ext.modeling.classes import UnevenLayers, plain_class
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
if not isinstance(model, UnevenLayers):
    model = plain_class(type(model)).from_pretrained(sys.argv[1])
model.classifier.bias.data += 1
def wait(*_):
    print("weights are written", flush=True)
    time.sleep(300)
saved.card_text = wait
model.save_pretrained(sys.argv[1])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and "written" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    left = [name for name in contents(tmp_path) if name not in before]
    assert any(name.endswith("model.safetensors") for name in left)
    assert {name: data for name, data in contents(tmp_path).items() if name in before} == before
    assert torch.equal(load(tmp_path)(**batch()).logits, pruned(**batch()).logits)
    pruned.save_pretrained(tmp_path)  # clears what the killed process left
    assert contents(tmp_path).keys() == before.keys()


def test_a_folder_that_is_a_file(pruned, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="it is a file. Pass the name of a folder"):
        pruned.save_pretrained(tmp_path / "file")


@IN_BOTH_LAYOUTS
@pytest.mark.parametrize(
    "options", [{"safe_serialization": False}, {"distributed_checkpoint": True}]
)
def test_ways_of_saving_that_are_refused(options, pruned, tmp_path) -> None:
    with pytest.raises(ValueError, match="Leave"):
        pruned.save_pretrained(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@IN_BOTH_LAYOUTS
def test_shards_and_single_files_replace_each_other(pruned, tmp_path) -> None:
    expected = pruned(**batch()).logits
    for size, single in (("8KB", False), ("1GB", True), ("5KB", False), ("8KB", False)):
        pruned.save_pretrained(tmp_path, max_shard_size=size)
        shards = sorted(path.name for path in tmp_path.glob("model-*-of-*.safetensors"))
        assert (tmp_path / "model.safetensors").exists() == single
        assert (tmp_path / "model.safetensors.index.json").exists() != single
        assert (len(shards) > 2) != single
        counted = {name.rsplit("-", 1)[1] for name in shards}
        assert len(counted) == (0 if single else 1)
        assert torch.equal(load(tmp_path)(**batch()).logits, expected)
    pruned.save_pretrained(tmp_path, variant="other")  # beside the usual one
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(load(tmp_path, variant="other")(**batch()).logits, expected)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / index["weight_map"]["classifier.bias"]).unlink()
    with pytest.raises(OSError, match="model-.*safetensors"):
        load(tmp_path)


@IN_BOTH_LAYOUTS
@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": True},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"dtype": torch.float64},
        {"dtype": "auto"},
        {"dtype": "bfloat16"},
    ],
)
@pytest.mark.parametrize("size", ["1GB", "8KB"])
def test_options_of_loading(options, size: str, pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path, max_shard_size=size)
    loaded = load(tmp_path, **options)
    wanted = options.get("dtype", torch.float32)
    names = {"auto": torch.float32, "bfloat16": torch.bfloat16}
    assert loaded.dtype == names.get(wanted, wanted)
    assert not loaded.training
    for name, value in pruned.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(loaded.state_dict()[name].dtype))
    with_info, info = load(tmp_path, output_loading_info=True)
    assert isinstance(pruned, type(with_info)) and not info["missing_keys"]


def change_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["bert.encoder.layer.1.output.dense.bias", "classifier.weight"])
def test_missing_tensors_are_refused(name: str, pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"lacks 1 tensors of this KPruneBert.*: {name}. "):
        load(tmp_path)


def test_another_head_may_be_missing_but_no_layer(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path)
    words = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert (
        torch.equal(words.bert.pooler.dense.weight, pruned.bert.pooler.dense.weight)
        if (words.bert.pooler)
        else words.bert.pooler is None
    )
    hidden = AutoModel.from_pretrained(tmp_path)(**batch()).last_hidden_state
    assert torch.equal(hidden, pruned.bert(**batch()).last_hidden_state)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    change_weights(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match="lacks 1 tensors of this KPruneBertForMaskedLM"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks 1 tensors of this KPruneBertModel"):
        AutoModel.from_pretrained(tmp_path)


def test_a_head_of_another_size_only_if_asked_for(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.*Restore both files"):
        load(tmp_path, num_labels=5)
    other = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert other.classifier.out_features == 5
    config = json.loads((tmp_path / "config.json").read_text())
    config["kprune"]["layers"][0].update(neurons="0-2", num_neurons=3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=r"Size mismatch.*3 tensors differ.*layer\.0\."):
            load(tmp_path, **options)


def test_pickled_weights_are_refused(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path)
    for options in ({"use_safetensors": False}, {"weights_only": False}):
        with pytest.raises(ValueError, match="safetensors only, as pickle files can run code"):
            load(tmp_path, **options)
    (tmp_path / "model.safetensors").unlink()
    torch.save(pruned.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, a pickle file.*is not read"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps({"weights": [1.0]}))
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        load(tmp_path)


def test_a_truncated_file_is_reported(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        load(tmp_path)


def test_an_embedding_model_reloads_as_one(tmp_path) -> None:
    model = kprune(tiny("mpnet", "embeddings"), padded(sequences()), progress=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for one, other in zip(outputs_of(loaded, batch()), outputs_of(model, batch()), strict=True):
        assert torch.equal(one, other)
