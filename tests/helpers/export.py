"""Trained CORDA adapters, and the updates that adapters make to weights."""

import json

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_corda import calibrate
from tests.helpers.corda import make_batches, make_config, make_model


def trained(kind="llama", dtype=torch.float32, size=0.05, **options):
    """A model whose adapter has moved away from where it started."""
    model, config = make_model(kind, dtype), make_config(kind, **options)
    calibrate(model, config, make_batches(), verbose=False)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)
    return adapted


def saved(folder, *args, **options):
    adapted = trained(*args, **options)
    adapted.save_pretrained(folder)
    return adapted


def updates_of(adapted):
    """ΔW by module, in float64."""
    found = {}
    for name, layer in adapted.base_model.model.named_modules():
        if hasattr(layer, "lora_A") and isinstance(layer.lora_A, nn.ModuleDict):
            a, b = (own["default"].weight.double().detach() for own in (layer.lora_A, layer.lora_B))
            delta = b @ a
            if hasattr(layer, "lora_start_A"):  # these are the changes from the start
                a0, b0 = (
                    start["default"].double() for start in (layer.lora_start_A, layer.lora_start_B)
                )
                delta = (b0 + b) @ (a0 + a) - b0 @ a0
            delta = layer.scaling["default"] * delta
            found[name] = delta
    return found


def loaded(folder, kind="llama", **options):
    return PeftModel.from_pretrained(make_model(kind), folder, **options).eval()


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def check_same_updates(actual, expected, atol=1e-6):
    assert actual.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(actual[name], delta, rtol=0, atol=atol)
