"""Clones made as TRL makes a reference policy: the same config, then a copy of all parameters."""

import copy
import dataclasses

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from tests.helpers.corda import calibrated, logits_of, make_batches, make_config, make_model

BATCH = make_batches(seed=7)[0]


def policy(folder, is_loaded, dtype=torch.float32, kind="llama", autocast=True, **options):
    """A trained adapter, live or loaded from disk."""
    model, config = calibrated(kind, dtype, **options)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=autocast)
    shift(adapted)
    if not is_loaded:
        return adapted.eval()
    adapted.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(
        make_model(kind, dtype), folder, is_trainable=True, autocast_adapter_dtype=autocast
    )
    return loaded.eval()


def shift(adapted):
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)


def clone(model, config):
    """As in the DPO, KTO, GRPO and RLOO trainers of TRL 1.16."""
    model.add_adapter("ref", config)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def check_clone(model):
    expected = logits_of(model, BATCH)
    model.base_model.set_adapter("ref")
    assert torch.equal(logits_of(model, BATCH), expected)
    model.base_model.set_adapter("default")
    return expected


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype", "autocast"),
    [
        ("llama", torch.float32, True),
        ("gpt2", torch.float32, True),
        ("bert", torch.bfloat16, True),
        ("llama", torch.bfloat16, False),
    ],
)
def test_clone_computes_the_same(kind, dtype, autocast, is_loaded, tmp_path):
    model = policy(tmp_path, is_loaded, dtype, kind, autocast, corda_method="ipm")
    clone(model, model.peft_config["default"])
    check_clone(model)


COPIES = {
    "copy": lambda config, folder: copy.copy(config),
    "deepcopy": lambda config, folder: copy.deepcopy(config),
    "replace": lambda config, folder: dataclasses.replace(config),
    "from disk": lambda config, folder: PeftConfig.from_pretrained(folder),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copied_configs(kind, dtype, tmp_path):
    model = policy(tmp_path, True, dtype)
    clone(model, COPIES[kind](model.peft_config["default"], tmp_path))
    check_clone(model)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_saved_clones(is_loaded, tmp_path):
    model = policy(tmp_path / "policy", is_loaded)
    clone(model, model.peft_config["default"])
    expected = check_clone(model)
    model.save_pretrained(tmp_path / "both")
    for folder in ("both", "both/ref"):
        loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / folder)
        assert torch.equal(logits_of(loaded, BATCH), expected)


def test_clone_of_an_adapter_whose_factors_were_dropped(tmp_path):
    model = policy(tmp_path, False)
    model.peft_config["default"].corda_factors = None
    clone(model, model.peft_config["default"])
    check_clone(model)


def test_new_factors_count(tmp_path):
    model = policy(tmp_path, True)
    _, other = calibrated("llama", corda_method="ipm")
    config = model.peft_config["default"]
    config.corda_method, config.corda_factors = "ipm", other.corda_factors
    model.add_adapter("second", config)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert not torch.equal(layer.lora_start_A["second"], layer.lora_start_A["default"])


def test_equal_config_does_not_count_as_a_start(tmp_path):
    model = policy(tmp_path, True)
    model.add_adapter("second", PeftConfig.from_pretrained(tmp_path))
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match="'second' has no start yet"):
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()


def test_fresh_config_has_no_start(tmp_path):
    model = policy(tmp_path, False)
    model.add_adapter("second", make_config(r=4, corda_method=None))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert not layer.lora_start_A["second"].any() and "second" not in layer.lora_start_B.started
