"""Adapters of version 0.1 are loaded, trained on, merged, saved again and exported."""

from __future__ import annotations

import shutil

import pytest
import torch
from accelerate.utils import compare_versions
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from peft_corda import CordaConfig, export_lora, initialize_corda
from tests.helpers.v0_1 import (
    check_converted,
    check_outputs,
    check_same,
    expected,
    load_base,
    outputs_of,
    read_json,
    text,
)

#: Base of each adapter.
ADAPTERS = {
    "llama": "llama",
    "llama-bfloat16": "llama",
    "llama-uncalibrated": "llama",
    "llama-modules-to-save": "llama",
    "gpt2": "gpt2",
    "bert": "bert",
    "bert-biases": "bert",
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_converted_to_the_bit(name: str) -> None:
    if name.endswith("biases") and compare_versions("peft", "<", "0.21"):
        pytest.skip("PEFT names trained biases in another way since 0.21")
    half = name.endswith("bfloat16")
    model = load_base(ADAPTERS[name], torch.bfloat16 if half else torch.float32)
    adapted = PeftModel.from_pretrained(model, f"adapters/{name}", autocast_adapter_dtype=not half)
    assert type(adapted.peft_config["default"]) is CordaConfig
    check_converted(
        get_peft_model_state_dict(adapted), load_file(f"adapters/{name}/adapter_model.safetensors")
    )
    check_outputs(adapted, text()[0], expected("adapters", name))


@pytest.mark.parametrize("name", ADAPTERS)
def test_options_of_adapters(name: str) -> None:
    config = PeftConfig.from_pretrained(f"adapters/{name}")
    assert type(config) is CordaConfig and config.peft_type == "CORDA"
    written = read_json(f"adapters/{name}/adapter_config.json")
    ours = [key for key in written if key.startswith("corda_") and key != "corda_config"]
    assert len(ours) == 5
    for key in (*ours, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias"):
        assert getattr(config, key) == written[key], key


def test_an_adapter_is_trained_on_and_merged() -> None:
    adapted = PeftModel.from_pretrained(load_base("llama"), "adapters/llama", is_trainable=True)
    batch = text()[0]
    adapted.train()(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 14 and all(p.grad is not None for p in trained)
    merged = adapted.eval().merge_and_unload()
    check_outputs(merged, batch, expected("adapters", "llama"))


def test_an_adapter_without_a_start_is_given_one_now() -> None:
    model = PeftModel.from_pretrained(
        load_base("llama"), "adapters/llama-uncalibrated", is_trainable=True
    )
    initialize_corda(model, text(), verbose=False)
    base = outputs_of(load_base("llama"), text()[0])["logits"]
    assert torch.equal(outputs_of(model.eval(), text()[0])["logits"], base)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_saved_again_an_adapter_computes_the_same_and_has_one_section_in_its_card(
    name: str, tmp_path
) -> None:
    shutil.copytree(f"adapters/{name}", tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(load_base(name), f"adapters/{name}")
    adapted.save_pretrained(tmp_path / "adapter")
    check_converted(
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
        load_file(f"adapters/{name}/adapter_model.safetensors"),
    )
    again = PeftModel.from_pretrained(load_base(name), tmp_path / "adapter")
    check_outputs(again, text()[0], expected("adapters", name))
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert card.count("<!-- peft_corda: start -->") == 1


def test_an_exported_adapter() -> None:
    lora = PeftModel.from_pretrained(load_base("llama"), "exported/llama")
    assert type(lora.peft_config["default"]) is LoraConfig
    check_same(
        get_peft_model_state_dict(lora), load_file("exported/llama/adapter_model.safetensors")
    )
    check_outputs(lora, text()[0], expected("adapters", "llama"))


def test_an_old_adapter_is_exported_as_it_was_then(tmp_path) -> None:
    """The exact export only scales and stacks, so it gives the same bits everywhere."""
    export_lora("adapters/llama", tmp_path / "lora")
    check_same(
        load_file(tmp_path / "lora" / "adapter_model.safetensors"),
        load_file("exported/llama/adapter_model.safetensors"),
    )


def test_an_old_export_is_replaced_or_left_alone(tmp_path) -> None:
    """Version 0.1 put no mark of its own into the file of weights, so it may be refused as foreign."""
    folder = tmp_path / "lora"
    shutil.copytree("exported/llama", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    try:
        export_lora("adapters/llama", folder, rank=3)
    except ValueError as error:
        assert "Give the path of a new folder" in str(error)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    else:
        lora = PeftConfig.from_pretrained(str(folder))
        assert type(lora) is LoraConfig and lora.r == 3
