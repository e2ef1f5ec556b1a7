"""Decoders on two devices, or partly offloaded to CPU memory and disk."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model

from kprune_ext import KPruneConfig, kprune
from kprune_ext.architectures.table import find_architecture
from kprune_ext.units.sublayers import layers_path
from tests.helpers.kprune import run
from tests.helpers.kprune_decoders import decoder_batches, tiny_decoder
from tests.helpers.pretend_devices import PretendDevices

CPU, OTHER = torch.device("cpu"), torch.device("cuda", 1)

FAMILIES = ("llama", "qwen3", "phi3", "gemma2", "gpt2", "opt")


def assert_same_weights(one, other) -> None:
    found = other.state_dict()
    assert one.state_dict().keys() == found.keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, found[name]), name


def places_of(model, layer_places) -> dict[str, object]:
    """A device map: the layers as given, everything else on the CPU."""
    path = layers_path(model, find_architecture(model))
    own = {f"{path}.{number}": place for number, place in enumerate(layer_places)}
    for name, module in model.named_modules():
        inside = any(f"{name}.".startswith(f"{layer}.") for layer in own)
        if not inside and not list(module.children()):
            own[name] = "cpu"
    return own


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_offloaded_layers(family: str, tmp_path) -> None:
    expected = run(tiny_decoder(family), decoder_batches(30), reduction=0.3)
    model = tiny_decoder(family)
    model = dispatch_model(
        model,
        places_of(model, ["cpu", "disk", "cpu"]),
        main_device="cpu",
        offload_dir=tmp_path,
        force_hooks=True,
    )
    pruned = run(model, decoder_batches(30), reduction=0.3)
    assert_same_weights(expected, pruned)
    assert pruned.kprune_report.perplexity == expected.kprune_report.perplexity


@pytest.mark.parametrize("family", FAMILIES)
def test_two_devices(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, batches = KPruneConfig(reduction=0.3), decoder_batches(30)
    expected = kprune(tiny_decoder(family), batches, config, progress=False)
    # accelerate's own part needs a real device.
    monkeypatch.setattr(
        "kprune_ext.model_layers.device_map.dispatch_model", lambda model, places: model
    )
    model = tiny_decoder(family)
    with PretendDevices() as mode:
        places = {
            path: OTHER if place == "other" else CPU
            for path, place in places_of(model, ["cpu", "other", "other"]).items()
        }
        for path, device in places.items():
            model.get_submodule(path).to(device)
        model.hf_device_map = places
        pruned = kprune(model, batches, config, progress=False)
    assert mode.moves > 0
    assert_same_weights(expected, pruned)
