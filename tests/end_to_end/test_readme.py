"""The README's Python does what it says, in the order it is printed."""

import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import TrainingArguments

from tests.helpers.corda import make_batches, make_model

ROOT = Path(__file__).parents[2]


def python_blocks(page="README.md"):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def arguments(folder):
    return TrainingArguments(
        output_dir=str(folder), max_steps=2, report_to=[], save_strategy="no", disable_tqdm=True
    )


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corda, reload, export, spend, prune, with_code, within = python_blocks()
    batches = make_batches()
    ids = batches[0]["input_ids"]

    names = {
        "model": make_model("llama"),
        "base_model": make_model("llama"),
        "dataloader": batches,
        "args": arguments(tmp_path / "run"),
        "train_dataset": [{"input_ids": row, "labels": row} for row in ids],
    }
    exec(corda, names)
    trained = names["model"]
    exec(reload, names)
    with torch.no_grad():
        expected = trained.cpu().eval()(input_ids=ids).logits
        assert torch.equal(names["model"].eval()(input_ids=ids).logits, expected)

    exec(export, names)
    lora = PeftModel.from_pretrained(make_model("llama"), tmp_path / "adapter-lora").eval()
    assert type(lora.peft_config["default"]) is LoraConfig
    with torch.no_grad():
        torch.testing.assert_close(lora(input_ids=ids).logits, expected, rtol=0, atol=1e-4)

    names["model"] = make_model("llama")
    exec(spend, names)
    sizes = sum(sum(module.shape) for module in names["factors"].modules.values())
    assert 7.5 * sizes < names["model"].num_parameters(only_trainable=True) <= 8 * sizes

    names = {
        "classifier": make_model("bert"),
        "dataloader": batches,
        "args": arguments(tmp_path / "run"),
        "train_dataset": [{"input_ids": row, "labels": row[0] % 2} for row in ids],
    }
    exec(prune, names)
    with torch.no_grad():
        expected = names["pruned"].cpu().eval()(input_ids=ids).logits
        assert torch.equal(names["classifier"].eval()(input_ids=ids).logits, expected)

    exec(with_code, names)
    assert (tmp_path / "pruned" / "modeling_kprune_ext.py").exists()
    names["classifier"] = make_model("bert")
    dense = names["classifier"].num_parameters()
    exec(within.replace("at_step=1000", "at_step=1"), names)
    assert names["classifier"].num_parameters() < dense
    assert names["classifier"].kprune_report.parameters_before == dense
