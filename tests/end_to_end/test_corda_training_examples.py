"""`examples/trl_sft.py` and `examples/corda_no_trainer.py` on a tiny model and files."""

import json
import re
import sys
from pathlib import Path

import corda_no_trainer
import local_text
import pytest
import torch
import trl_sft
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(corda_no_trainer.__file__).parent


@pytest.fixture
def texts(tmp_path):
    """Two files of texts: to learn, and to keep."""
    pairs = {"task": local_text.word_problems(24, 0), "keep": local_text.facts()[:12]}
    for name, rows in pairs.items():
        lines = [json.dumps({"text": f"{question} {answer}"}) for question, answer in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def loss_of(model, tiny_model, texts):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    rows = [json.loads(line)["text"] for line in (texts / "task.jsonl").read_text().splitlines()]
    batch = tokenizer(rows, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        return model.eval()(**batch, labels=labels).loss.item()


def check_adapter(folder, tiny_model, texts):
    """The saved adapter has learned the task, and has a start other than zero."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = loss_of(base, tiny_model, texts)
    model = PeftModel.from_pretrained(base, folder)
    assert loss_of(model, tiny_model, texts) < before - 0.02
    starts = [buffer for name, buffer in model.named_buffers() if "lora_start_B" in name]
    assert starts and all(start.abs().max() > 0 for start in starts)


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_loop_without_trainer(texts, tiny_model, method):
    keep = f"--keep {texts / 'keep.jsonl'}" if method == "kpm" else ""
    options = (
        f"--model {tiny_model} --data {texts / 'task.jsonl'} {keep} --rank 4 --epochs 2 "
        f"--learning-rate 0.02 --batch-size 4 --output {texts / 'out'}"
    )
    corda_no_trainer.main(options.split())
    check_adapter(texts / "out", tiny_model, texts)
    assert json.loads((texts / "out" / "adapter_config.json").read_text())["corda_method"] == method


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_trl_script(texts, tiny_model, method, monkeypatch):
    calibration = f"--calibration {texts / 'keep.jsonl'}" if method == "kpm" else ""
    options = (
        f"--model {tiny_model} --dataset {texts / 'task.jsonl'} --corda_method {method} {calibration} "
        f"--r 4 --samples 8 --output_dir {texts / 'out'} --export_to {texts / 'lora'} --max_steps 8 "
        "--learning_rate 0.02 --per_device_train_batch_size 4 --use_cpu True --bf16 False "
        "--report_to none --save_strategy no"
    )
    monkeypatch.setattr(sys, "argv", ["trl_sft.py", *options.split()])
    trl_sft.main()
    check_adapter(texts / "out", tiny_model, texts)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), texts / "lora"
    )
    assert type(plain.peft_config["default"]) is LoraConfig
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), texts / "out"
    )
    losses = [loss_of(model, tiny_model, texts) for model in (plain, adapted)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("script", ["trl_sft.py", "corda_no_trainer.py"])
def test_without_the_marked_lines_nothing_of_ours_is_left(script):
    """So the marks show all that has to be added."""
    lines = (EXAMPLES / script).read_text().splitlines()
    code = lines[next(n for n, line in enumerate(lines) if line.startswith("from __future__")) :]
    plain = "\n".join(line for line in code if "# CorDA" not in line)
    assert not re.findall(r"corda|calibrat", plain.replace("output/corda", ""), flags=re.IGNORECASE)
