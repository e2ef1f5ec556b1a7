"""An exported adapter in a process that never heard of this package, and out of a Trainer."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from peft_corda import CordaConfig, CordaExportCallback, calibrate, export_lora
from tests.helpers.corda import (
    adapters_of_transformers,
    logits_of,
    make_batches,
    make_config,
    make_model,
    train_steps,
)

LOAD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from peft import PeftModel

for folder in map(Path, sys.argv[1:]):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "lora").eval()
    given = load_file(folder / "given.safetensors")
    with torch.no_grad():
        found = model(input_ids=given["ids"]).logits
    torch.testing.assert_close(found, given["logits"], rtol=0, atol=1e-4)
try:  # what the card of the checkpoint is about
    PeftModel.from_pretrained(base, folder / "corda")
except KeyError as error:
    assert str(error) == "'CORDA'"
else:
    raise AssertionError("loaded without the plugin")
assert not any(name.split(".")[0] == "peft_corda" for name in sys.modules)
"""


def test_loads_without_the_plugin(tmp_path):
    kinds = ["llama", "gpt2"]
    for folder, kind in zip(map(tmp_path.joinpath, kinds), kinds, strict=True):
        model, config = make_model(kind), make_config(kind, corda_method="ipm", use_rslora=True)
        model.save_pretrained(folder / "base")
        calibrate(model, config, make_batches(), verbose=False)
        adapted, batch = get_peft_model(model, config), make_batches(seed=7)[0]
        train_steps(adapted, batch)
        adapted.save_pretrained(folder / "corda")
        export_lora(folder / "corda", folder / "lora")
        given = {"ids": batch["input_ids"], "logits": logits_of(adapted, batch)}
        save_file(given, folder / "given.safetensors")
    folders = [str(tmp_path / kind) for kind in kinds]
    done = subprocess.run([sys.executable, "-c", LOAD, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def trainer(model, folder, callback, **options):
    ids = torch.randint(3, 99, (16, 10), generator=torch.Generator().manual_seed(5))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, learning_rate=5e-3, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="no", per_device_train_batch_size=4, **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])


def adapted(name="default"):
    model, config = make_model("llama"), make_config(corda_method="ipm")
    calibrate(model, config, make_batches(), verbose=False)
    return get_peft_model(model, config, adapter_name=name)


class TestCallback:
    @pytest.mark.parametrize("name", ["default", "mine"])
    def test_exports_at_the_end_of_training(self, name, tmp_path):
        model = adapted(name)
        callback = CordaExportCallback(tmp_path / "lora", dtype="float32")
        trainer(model, tmp_path / "run", callback).train()
        batch = make_batches(seed=7)[0]
        lora = PeftModel.from_pretrained(make_model("llama"), tmp_path / "lora")
        assert type(lora.peft_config["default"]) is LoraConfig
        expected = logits_of(model, batch)
        assert not torch.equal(expected, logits_of(make_model("llama"), batch))
        torch.testing.assert_close(logits_of(lora, batch), expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("by", ["transformers", "PEFT"])
    def test_of_an_adapter_that_was_added_without_a_peft_model(self, by, tmp_path):
        model, config = make_model("llama"), make_config()
        calibrate(model, config, make_batches(), verbose=False)
        if by == "transformers":
            with adapters_of_transformers():
                model.add_adapter(config, adapter_name="mine")
        else:
            inject_adapter_in_model(config, model, adapter_name="mine")
        for rank in (3, None):
            callback = CordaExportCallback(tmp_path / f"lora-{rank}", rank, dtype="float32")
            trainer(model, tmp_path / "run", callback).train()
        tensors = load_file(tmp_path / "lora-3" / "adapter_model.safetensors")
        assert len(tensors) == 28
        assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {3}
        lora = PeftModel.from_pretrained(make_model("llama"), tmp_path / "lora-None")
        batch = make_batches(seed=7)[0]
        expected = logits_of(model, batch)
        assert not torch.allclose(expected, logits_of(make_model("llama"), batch), atol=1e-3)
        torch.testing.assert_close(logits_of(lora, batch), expected, rtol=0, atol=1e-4)

    def test_only_the_main_process_exports(self, tmp_path):
        model = adapted()
        callback = CordaExportCallback(tmp_path / "lora")
        run = trainer(model, tmp_path / "run", callback)
        run.state.is_world_process_zero = False
        callback.on_train_end(run.args, run.state, run.control, model=model)
        assert not (tmp_path / "lora").exists()

    def test_errors_come_before_training(self, tmp_path):
        with pytest.raises(ValueError, match="rank must be a whole number"):
            CordaExportCallback(tmp_path / "lora", rank=0)
        plain = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"this PeftModel has \['default'\] active. Activate"):
            trainer(plain, tmp_path / "run", CordaExportCallback(tmp_path / "lora")).train()
        callback = CordaExportCallback(tmp_path / "lora")
        (tmp_path / "lora").mkdir()
        (tmp_path / "lora" / "notes.txt").write_text("")
        run = trainer(adapted(), tmp_path / "run", callback)
        with pytest.raises(ValueError, match="holds other files"):
            run.train()
        assert run.state.global_step == 0


def test_config_of_the_live_adapter_stays_corda(tmp_path):
    model = adapted()
    trainer(model, tmp_path / "run", CordaExportCallback(tmp_path / "lora")).train()
    assert type(model.peft_config["default"]) is CordaConfig
