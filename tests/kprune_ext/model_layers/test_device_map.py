"""Pruning models that accelerate keeps in CPU memory or on disk, and where their parts end up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from kprune_ext import KPruneConfig, kprune
from kprune_ext.architectures.table import find_architecture
from kprune_ext.model_layers.device_map import device_map_of, device_of, require_whole_layers
from kprune_ext.units.sublayers import layers_path
from tests.helpers.kprune import padded, sequences, tiny_bert
from tests.helpers.kprune_models import CASES, FAMILIES, batches_for, tiny
from tests.helpers.pretend_devices import PretendDevices

CONFIG = KPruneConfig(reduction=0.5)
CPU, OTHER = torch.device("cpu"), torch.device("cuda", 1)


def partly_on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Every other layer on disk, the rest in memory, everything with hooks."""
    layers = layers_path(model, find_architecture(model))
    places = {}
    for name, _ in model.named_parameters():
        inside = name.startswith(f"{layers}.")
        path = (
            ".".join(name.split(".")[: layers.count(".") + 2])
            if inside
            else name.rpartition(".")[0]
        )
        places[path] = "disk" if inside and int(path.rpartition(".")[2]) % 2 else "cpu"
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "cpu": lambda model, folder: cpu_offload(model, CPU),
    "disk": lambda model, folder: disk_offload(model, str(folder), CPU),
    "device_map": partly_on_disk,
}


def away(model: PreTrainedModel) -> set[str]:
    return {name for name, value in model.named_parameters() if value.is_meta}


@pytest.mark.parametrize(
    ("family", "offload"),
    [
        *(("bert", offload) for offload in OFFLOADS),
        *((f, "device_map") for f in FAMILIES if f != "bert"),
    ],
)
def test_result_is_that_of_the_model_in_memory(family: str, offload: str, tmp_path: Path) -> None:
    expected = kprune(tiny(family), batches_for(family), CONFIG, progress=False)
    model = OFFLOADS[offload](tiny(family), tmp_path)
    before = away(model)
    assert before
    hooked = {name for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    pruned = kprune(model, batches_for(family), CONFIG, progress=False)
    assert away(model) == before
    assert {n for n, module in model.named_modules() if hasattr(module, "_hf_hook")} == hooked
    assert pruned.config.kprune == expected.config.kprune
    found = pruned.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())
    assert not any(hasattr(module, "_hf_hook") for module in pruned.modules())


@pytest.mark.parametrize("schedule", ["per_layer", "per_sublayer"])
def test_paper_mode_of_an_offloaded_model(schedule: str, tmp_path: Path) -> None:
    config = KPruneConfig.paper(0.5, schedule=schedule)
    batches = padded(sequences())
    expected = kprune(tiny_bert(), batches, config, progress=False)
    found = kprune(disk_offload(tiny_bert(), str(tmp_path), CPU), batches, config, progress=False)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_model_loaded_with_a_device_map_and_pruned_twice(tmp_path: Path) -> None:
    tiny_bert(layers=3).save_pretrained(tmp_path / "dense")
    places = {"bert.embeddings": "cpu", "bert.pooler": "cpu", "classifier": "cpu"} | {
        f"bert.encoder.layer.{number}": "disk" for number in range(3)
    }
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "dense", device_map=places, offload_folder=tmp_path / "weights"
    )
    assert away(model)
    batches = padded(sequences())
    expected = kprune(tiny_bert(layers=3), batches, CONFIG, progress=False)
    once = kprune(model, batches, CONFIG, progress=False)
    once.save_pretrained(tmp_path / "pruned")
    again = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "pruned", device_map=places, offload_folder=tmp_path / "more"
    )
    assert away(again)
    with torch.no_grad():
        assert torch.equal(again(**batches[0]).logits, expected(**batches[0]).logits)
    twice = kprune(again, batches, CONFIG, progress=False)
    for name, value in kprune(expected, batches, CONFIG, progress=False).state_dict().items():
        assert torch.equal(twice.state_dict()[name], value), name


def on_two_devices(model: PreTrainedModel) -> dict[str, torch.device]:
    """The first layer and what comes before it on the CPU, the last one and the head elsewhere."""
    layers = layers_path(model, find_architecture(model))
    places: dict[str, torch.device] = {}
    for name, _ in model.named_parameters():
        before = ".".join(name.split(".")[: layers.count(".") + 2])
        path = before if name.startswith(f"{layers}.") else name.rpartition(".")[0]
        early = path == f"{layers}.0" or "embeddings" in path or "rel_" in path
        places[path] = CPU if early else OTHER
    for path, device in places.items():
        model.get_submodule(path).to(device)
    model.hf_device_map = places
    return places


def test_pretended_devices_do_not_mix() -> None:
    with PretendDevices():
        there = torch.ones(2).to(OTHER)
        assert (there + 1).device == there.view(1, 2).device == OTHER
        assert there.to(CPU).device == torch.ones(2).device == CPU
        with pytest.raises(RuntimeError, match=r"tensors on \['cpu', 'cuda:1'\]"):
            there + torch.ones(2)


@pytest.mark.parametrize(
    ("family", "task", "config"),
    [
        *((family, task, CONFIG) for family, task in CASES if family in ("bert", "vit")),
        *((family, None, CONFIG) for family in FAMILIES if family not in ("bert", "vit")),
        ("bert", None, KPruneConfig.paper(0.5)),
    ],
)
def test_two_devices(
    family: str, task: str | None, config: KPruneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = batches_for(family)
    expected = kprune(tiny(family, task), batches, config, progress=False)
    spread: list[dict[str, torch.device]] = []
    # accelerate's own part needs a real device.
    monkeypatch.setattr(
        "kprune_ext.model_layers.device_map.dispatch_model",
        lambda model, places: (spread.append(places), model)[1],
    )
    model = tiny(family, task)
    with PretendDevices() as mode:
        places = on_two_devices(model)
        pruned = kprune(model, batches, config, progress=False)
        found = {name: mode.place(value) for name, value in pruned.named_parameters()}
    assert mode.moves > 0
    assert len(spread) == 1
    assert not any(hasattr(module, "_hf_hook") for module in pruned.modules())
    for name, value in expected.state_dict().items():
        assert torch.equal(pruned.state_dict()[name], value), name
    layers = layers_path(model, find_architecture(model))
    for name, value in pruned.named_parameters():
        if value.numel() and name.startswith(f"{layers}."):
            assert found[name] == device_of(name, places, CPU), name


def test_homes_follow_the_longest_path() -> None:
    model = tiny_bert()
    model.hf_device_map = {"": 1, "bert.embeddings": "disk", "bert.encoder.layer.1": "cpu"}
    device_map = device_map_of(model)
    assert device_of("bert.embeddings.word_embeddings.weight", device_map, OTHER) == CPU
    assert device_of("bert.encoder.layer.1.output.dense.weight", device_map, OTHER) == CPU
    assert device_of("bert.encoder.layer.10.output.dense.weight", device_map, OTHER) == OTHER
    del model.hf_device_map
    assert device_of("embeddings", {"layers": CPU}, OTHER) == OTHER
    assert device_map_of(model) == {"": CPU}


def test_a_layer_on_two_devices_is_refused() -> None:
    model = tiny_bert()
    layers = "bert.encoder.layer"
    split = {"": CPU, f"{layers}.1.output": OTHER}
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.1 is on several.*cpu, cuda:1"):
        require_whole_layers(model, layers, split)
    require_whole_layers(model, layers, {"": CPU, f"{layers}.1": OTHER})


def test_latency_of_an_offloaded_model_is_refused(tmp_path: Path) -> None:
    model = disk_offload(tiny_bert(), str(tmp_path), CPU)
    with pytest.raises(ValueError, match="measured on one device"):
        kprune(model, padded(sequences()), KPruneConfig(metric="latency"), progress=False)
    assert away(model)
