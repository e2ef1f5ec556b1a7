"""Damaged and hostile checkpoints: a clear error, or a warning where the damage does no harm."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from kprune_ext import load_report
from kprune_ext.checkpoint_files.self_contained import MODELING_FILE
from tests.helpers.kprune_checkpoints import batch, load

REPORT = "kprune_report.json"


def change_json(path: Path, change: Any) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def index_of(names: dict[str, Any]) -> str:
    return json.dumps({"metadata": {}, "weight_map": names})


@pytest.mark.parametrize("subfolder", ["", "inner"])
@pytest.mark.parametrize("variant", [None, "other"])
@pytest.mark.parametrize(
    "name",
    [
        "shard.pt",
        "../outside.bin",
        "../outside.safetensors",
        "{}/outside.safetensors",
        "model.safetensors/../../outside.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        5,
    ],
)
def test_shards_elsewhere_or_pickled(name, variant, subfolder, pruned, tmp_path) -> None:
    folder = tmp_path / "model" / subfolder
    pruned.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "shard.pt")
    torch.save(weights, tmp_path / "outside.bin")
    save_file(weights, tmp_path / "outside.safetensors", metadata={"format": "pt"})
    given = name.format(tmp_path) if isinstance(name, str) else name
    index = f"model.safetensors.index{'.other' if variant else ''}.json"
    (folder / index).write_text(index_of(dict.fromkeys(weights, given)))
    with pytest.raises(ValueError, match=f"{index} of .* names the weights file"):
        load(tmp_path / "model", variant=variant, subfolder=subfolder)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', "[" * 100_000, "\udcff"])
def test_a_damaged_index(text: str, pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"index.json in .* is not an index of weights"):
        load(tmp_path)


def test_shards_of_a_repository(pruned, tmp_path, monkeypatch) -> None:
    """In the cache of the hub, where files are links to other folders."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--me--name"
    snapshot = folder / "snapshots" / commit
    pruned.save_pretrained(tmp_path / "saved", max_shard_size="8KB")
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    shutil.copytree(tmp_path / "saved", folder / "blobs")
    for path in (folder / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    options = {"cache_dir": str(tmp_path), "local_files_only": True}
    expected = pruned(**batch()).logits
    for source in ("me/name", snapshot):
        own = options if isinstance(source, str) else {}
        loaded = AutoModelForSequenceClassification.from_pretrained(source, **own)
        assert torch.equal(loaded(**batch()).logits, expected)
    index = folder / "blobs" / "model.safetensors.index.json"
    torch.save(pruned.state_dict(), snapshot / "shard.pt")
    index.write_text(index_of(dict.fromkeys(pruned.state_dict(), "shard.pt")))
    for source in ("me/name", snapshot):
        own = options if isinstance(source, str) else {}
        with pytest.raises(ValueError, match="is not a safetensors file"):
            AutoModelForSequenceClassification.from_pretrained(source, **own)


def test_other_ways_to_a_pickle(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", lambda c: c.update(transformers_weights="a.bin"))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load(tmp_path)
    change_json(tmp_path / "config.json", lambda c: c.pop("transformers_weights"))
    load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="an adapter in adapter_model.bin, a pickle file"):
        type(pruned).from_pretrained(tmp_path)


DAMAGED_REPORTS: dict[str, Any] = {
    "empty": b"",
    "cut": b'{"sublayers": [{"name": "bert',
    "no utf-8": b"\xff\xfe\x00",
    "a list": b"[]",
    "nothing": b"null",
    "deep": b"[" * 100_000,
    "no rows": lambda r: r.update(sublayers=[]),
    "rows of text": lambda r: r.update(sublayers="ab"),
    "text for a number": lambda r: r["sublayers"][0].update(flops="many"),
    "another kind": lambda r: r["sublayers"][0].update(kind="other"),
    "another metric": lambda r: r.update(metric="beauty"),
    "nothing before": lambda r: r.update(cost_before=0),
    "no tokens": lambda r: r.pop("tokens"),
    "infinite": lambda r: r.update(cost=float("inf")),
    "a scale of text": lambda r: r.update(logit_scale="x"),
}


@pytest.mark.parametrize("case", DAMAGED_REPORTS)
def test_a_damaged_report_blocks_nothing(case: str, pruned, tmp_path, caplog) -> None:
    pruned.save_pretrained(tmp_path)
    damage = DAMAGED_REPORTS[case]
    if isinstance(damage, bytes):
        (tmp_path / REPORT).write_bytes(damage)
    else:
        change_json(tmp_path / REPORT, damage)
    model = load(tmp_path)
    assert model.kprune_report is None
    assert caplog.text.count("The report is left out, as it is damaged") == 1
    assert torch.equal(model(**batch()).logits, pruned(**batch()).logits)
    assert load_report(tmp_path).parameters == pruned.kprune_report.parameters
    with pytest.raises(ValueError, match="is not a report of kprune"):
        load_report(tmp_path / REPORT)
    pruned.save_pretrained(tmp_path)
    assert load(tmp_path).kprune_report == pruned.kprune_report


def rows(config: dict) -> Any:
    return config["kprune"]["layers"]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


LONG = ",".join(f"{n}-{n + 999_999}" for n in range(0, 10**9, 1_000_000))
HOSTILE: dict[str, Any] = {
    "a long run": lambda c: rows(c)[0].update(neurons="0-999999999999", num_neurons=10**12),
    "many long runs": lambda c: rows(c)[0].update(neurons=LONG, num_neurons=10**9),
    "a huge number": lambda c: rows(c)[0].update(neurons="9" * 5000),
    "a negative number": lambda c: rows(c)[0].update(neurons="-5"),
    "a negative run": lambda c: rows(c)[0].update(neurons="3--1"),
    "other digits": lambda c: rows(c)[0].update(neurons="٣"),
    "spaces": lambda c: rows(c)[0].update(neurons=" 1 , 2 "),
    "long text": lambda c: rows(c)[0].update(neurons="1," * 10**6),
    "a list": lambda c: rows(c)[0].update(neurons=[0, 1, 2]),
    "nested lists": lambda c: rows(c)[0].update(neurons=nested(300)),
    "a nested format": lambda c: c["kprune"].update(format=nested(300)),
    "a number": lambda c: rows(c)[0].update(heads=3),
    "nothing": lambda c: rows(c)[0].update(heads=None),
    "a negative count": lambda c: rows(c)[0].update(num_heads=-1),
    "a row of text": lambda c: rows(c).__setitem__(0, "heads"),
    "no row": lambda c: rows(c).__setitem__(0, None),
    "rows of text": lambda c: c["kprune"].update(layers="ab"),
    "rows of a mapping": lambda c: c["kprune"].update(layers={"0": 1, "1": 2}),
    "rows of a number": lambda c: c["kprune"].update(layers=2),
    "text": lambda c: c.update(kprune="everything"),
    "a field of a list": lambda c: c.update(kprune=[1]),
    "false": lambda c: c.update(kprune=False),
    "many layers": lambda c: c.update(num_hidden_layers=10**9),
    "layers below zero": lambda c: c.update(num_hidden_layers=-1),
    "many neurons": lambda c: (
        c.update(intermediate_size=10**12),
        rows(c)[0].update(neurons="0-999999999999", num_neurons=10**12),
    ),
    "no heads": lambda c: c.update(num_attention_heads=0),
    "many rows of many": lambda c: (
        c.update(intermediate_size=2**22, num_hidden_layers=9000),
        c["kprune"].update(
            layers=[
                {"heads": "0", "num_heads": 1, "neurons": "0-4194303", "num_neurons": 2**22}
            ] * 9000
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config(case: str, pruned, tmp_path) -> None:
    """One clear error, in little memory."""
    pruned.save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", HOSTILE[case])
    text = r"field 'kprune' of this model's config is damaged|The config says that the model has"
    tracemalloc.start()
    try:
        for auto in (AutoModelForSequenceClassification, AutoModel):
            with pytest.raises(ValueError, match=text) as error:
                auto.from_pretrained(tmp_path)
            assert len(str(error.value)) < 1000
        assert tracemalloc.get_traced_memory()[1] < 4 * 10**8
    finally:
        tracemalloc.stop()
    (tmp_path / REPORT).unlink()
    with pytest.raises(ValueError, match=text):
        load_report(tmp_path)


@pytest.mark.parametrize("case", sorted(HOSTILE.keys() - {"many neurons", "many rows of many"}))
def test_a_hostile_config_of_a_self_contained_checkpoint(
    case: str, pruned, tmp_path, monkeypatch
) -> None:
    """The modelling file checks as much as it reads itself."""
    pruned.save_pretrained(tmp_path, self_contained=True)
    change_json(tmp_path / "config.json", HOSTILE[case])
    if case in ("many layers", "no heads", "layers below zero"):
        return  # transformers itself builds the layers before
    spec = importlib.util.spec_from_file_location("made_modeling", tmp_path / MODELING_FILE)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "made_modeling", made)
    spec.loader.exec_module(made)
    config = made.KPruneBertConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="field 'kprune' of this model's config is damaged"):
        made.KPruneBertForSequenceClassification(config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["classifier.bias", "bert.encoder.layer.1.output.dense.weight"])
def test_values_that_are_not_finite_are_told(name, value, pruned, tmp_path, caplog) -> None:
    pruned.save_pretrained(tmp_path)
    load(tmp_path)
    assert "NaN or infinite" not in caplog.text
    weights = load_file(tmp_path / "model.safetensors")
    weights[name].reshape(-1)[-1] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path)
    assert f"NaN or infinite values in {name}." in caplog.text
