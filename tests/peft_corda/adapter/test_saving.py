"""Adapters that are saved and reloaded, and factors that come from a file."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_corda import CordaConfig
from tests.helpers.corda import (
    KINDS,
    calibrated,
    logits_of,
    make_batches,
    make_config,
    make_model,
    train_steps,
)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_reloads_on_the_original_base(kind, dtype, low_cpu_mem_usage, tmp_path):
    model, config = calibrated(kind, dtype, corda_method="ipm")
    batch = make_batches(seed=7)[0]
    adapted = get_peft_model(model, config)
    train_steps(adapted, batch)
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(
        make_model(kind, dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits_of(reloaded, batch), logits_of(adapted, batch))


def test_checkpoint_has_the_start_in_it_and_the_config_no_factors(tmp_path):
    model, config = calibrated("llama")
    get_peft_model(model, config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key in list(tensors):
        if key.endswith("lora_A.weight"):
            b = key.replace("lora_A.weight", "lora_B.weight")
            assert not tensors[key].any() and not tensors[b].any()
            assert tensors[key.replace("lora_A.weight", "lora_start_A")].any()
            assert tensors[b.replace("lora_B.weight", "lora_start_B")].any()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["corda_format"] == 2
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, CordaConfig)
    assert loaded.corda_method == "kpm" and loaded.corda_factors is None
    assert config.corda_factors is not None  # saving does not take them from the live config


def test_reloaded_adapter_can_be_trained_on(tmp_path):
    model, config = calibrated("llama")
    batch = make_batches(seed=7)[0]
    get_peft_model(model, config).save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(make_model("llama"), tmp_path, is_trainable=True)
    before = logits_of(reloaded, batch)
    assert torch.equal(before, logits_of(make_model("llama"), batch))
    train_steps(reloaded, batch)
    assert not torch.equal(logits_of(reloaded, batch), before)


def test_loading_weights_into_a_live_adapter_is_not_undone(tmp_path):
    """Trainer resumes by `load_adapter` into the adapter that training began with."""
    model, config = calibrated("llama", torch.bfloat16)
    batch = make_batches(seed=7)[0]
    adapted = get_peft_model(model, config)
    train_steps(adapted, batch)
    trained = logits_of(adapted, batch)
    adapted.save_pretrained(tmp_path)
    fresh = get_peft_model(make_model("llama", torch.bfloat16), config)
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits_of(fresh, batch), trained)


def test_factors_from_a_file(tmp_path):
    model, config = calibrated("llama")
    batch = make_batches(seed=7)[0]
    config.corda_factors.save(tmp_path / "factors.safetensors")
    from_memory = get_peft_model(model, config)
    from_file = get_peft_model(
        make_model("llama"), make_config(corda_factors=str(tmp_path / "factors.safetensors"))
    )
    train_steps(from_memory, batch)
    train_steps(from_file, batch)
    assert torch.equal(logits_of(from_memory, batch), logits_of(from_file, batch))
