"""Damaged adapters, factors and base weights are refused before a module is replaced."""

import json
import re

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_corda import CordaFactors, calibrate, export_lora, initialize_corda
from peft_corda.adapter_layers.layer import CordaLayer
from tests.helpers.corda import calibrated, logits_of, make_batches, make_config, make_model
from tests.helpers.export import saved, trained

BATCH = make_batches(seed=7)[0]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def changed(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def without(*endings):
    def change(tensors):
        for key in [key for key in tensors if key.endswith(endings)]:
            del tensors[key]

    return change


def with_value(key, value):
    def change(tensors):
        tensors[key][0, 0] = value

    return change


DAMAGES = {
    "no A0": (without("lora_start_A"), "lacks 14 tensors, such as .*lora_start_A"),
    "no B0": (without("lora_start_B"), "lacks 14 tensors, such as .*lora_start_B"),
    "no start": (without("lora_start_A", "lora_start_B"), "lacks 28 tensors"),
    "no factors": (without("lora_A.weight", "lora_B.weight"), "lacks 28 tensors"),
    "half a pair": (without("0.self_attn.q_proj.lora_A.weight"), "lacks 1 tensors"),
    "NaN": (with_value(f"{Q}.lora_start_A", float("nan")), "q_proj has NaN or infinite values"),
    "infinite": (with_value(f"{Q}.lora_B.weight", float("inf")), "q_proj has NaN or infinite"),
    "shape": (
        lambda t: t.update({f"{Q}.lora_start_A": torch.ones(8, 7)}),
        "shapes of the factors of",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_adapter(kind, tmp_path):
    change, message = DAMAGES[kind]
    saved(tmp_path / "a")
    changed(tmp_path / "a", change)
    base = make_model("llama")
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path / "a")
    assert not any(isinstance(module, CordaLayer) for module in base.modules())
    live = trained()
    expected = logits_of(live, BATCH)
    with pytest.raises(ValueError, match=message):
        live.load_adapter(tmp_path / "a", "second")
    assert "second" not in live.peft_config
    if hasattr(peft.tuners.tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load"):
        with pytest.raises(ValueError, match=message):
            live.load_adapter(tmp_path / "a", "default")  # as the Trainer does on resuming
    assert torch.equal(logits_of(live, BATCH), expected)
    with pytest.raises(ValueError, match="lacks|do not match|NaN or infinite"):
        export_lora(tmp_path / "a", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_start_that_is_missing_for_an_adapter_without_one(tmp_path):
    model = get_peft_model(make_model("llama"), make_config())
    tensors = {k: v for k, v in trained().state_dict().items() if "lora_A." in k or "lora_B." in k}
    with pytest.raises(RuntimeError, match="lacks .*lora_start_A.default"):
        model.load_state_dict(tensors, strict=False)


@pytest.mark.parametrize("read", [None, PeftConfig.from_pretrained])
def test_factors_named_by_a_checkpoint_are_ignored(read, tmp_path):
    expected = logits_of(saved(tmp_path), BATCH)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "corda_factors": "/etc/passwd"}))
    with pytest.warns(UserWarning, match="corda_factors='/etc/passwd' .* is ignored"):
        config = None if read is None else read(tmp_path)
        loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path, config=config)
    assert torch.equal(logits_of(loaded, BATCH), expected)


class TestFactors:
    @pytest.fixture
    def path(self, tmp_path):
        _, config = calibrated("llama")
        config.corda_factors.save(tmp_path / "factors")
        return tmp_path / "factors"

    def test_any_flipped_bit(self, path):
        content = bytearray(path.read_bytes())
        for position in range(len(content) // 3, len(content), 4001):
            damaged = bytearray(content)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="is damaged|not a readable"):
                CordaFactors.load(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f: f.U.__setitem__((0, 0), float("nan")), "have NaN or infinite values"),
            (lambda f: f.S.__setitem__(0, float("inf")), "have NaN or infinite values"),
            (lambda f: object.__setattr__(f, "S", f.S[:-1]), "which do not belong together"),
            (lambda f: object.__setattr__(f, "U", f.U.T), "which do not belong together"),
        ],
    )
    def test_unsound_values(self, path, change, message):
        factors = CordaFactors.load(path)
        change(next(iter(factors.modules.values())).directions["kpm"])
        model = make_model("llama")
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, make_config(corda_factors=factors))
        assert not any(isinstance(module, CordaLayer) for module in model.modules())
        if "belong" not in message or factors.modules:
            factors.save(path)
            with pytest.raises(ValueError, match=message):
                CordaFactors.load(path)

    def test_files_without_a_checksum_are_read(self, path):
        with safe_open(path, framework="pt") as file:
            metadata = {k: v for k, v in file.metadata().items() if k != "sha256"}
        save_file(load_file(path), path, metadata)
        get_peft_model(make_model("llama"), make_config(corda_factors=str(path)))


def test_base_weight_that_is_not_finite():
    model, config = calibrated("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"weight of model\.layers\.1\.mlp\.up_proj has NaN"):
        get_peft_model(model, config)
    assert not any(isinstance(module, CordaLayer) for module in model.modules())


@pytest.mark.parametrize("options", [{}, {"inference_mode": True}])
def test_initializing_keeps_parameters_frozen(options):
    model = get_peft_model(make_model("llama"), make_config(**options))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    initialize_corda(model, make_batches(), verbose=False)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError):
        initialize_corda(model, [], verbose=False)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_calibration_names_its_checksum(tmp_path):
    model, config = make_model("llama"), make_config()
    factors = calibrate(model, config, make_batches(), verbose=False)
    factors.save(tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        assert re.fullmatch("[0-9a-f]{64}", file.metadata()["sha256"])
    CordaFactors.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
