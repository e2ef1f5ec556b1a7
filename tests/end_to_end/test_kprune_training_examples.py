"""The examples that prune within a training run, and train after pruning."""

from __future__ import annotations

import json
import re
import sys

import kprune_distillation
import kprune_glue
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kprune_ext import load_report
from tests.helpers.kprune import tiny_bert, word_tokenizer


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny_bert(neurons=64).save_pretrained(folder)
    word_tokenizer(folder).save_pretrained(folder)
    return folder


def rows(count: int, name: str) -> str:
    made = [
        {name: f"word{3 * n % 40} word{n % 7} word{n % 3}", "label": n % 3} for n in range(count)
    ]
    return "\n".join(json.dumps(row) for row in made)


def test_glue(model, tmp_path, monkeypatch, capsys) -> None:
    for name, count in (("train", 48), ("dev", 12)):
        (tmp_path / f"{name}.json").write_text(rows(count, "sentence1"))
    options = (
        f"--model {model} --train {tmp_path}/train.json --validation {tmp_path}/dev.json "
        f"--output_dir {tmp_path}/out --max_steps 4 --save_steps 2 --prune_at 2 --reduction 0.5 "
        "--use_cpu True --report_to none --disable_tqdm True --self_contained True"
    )
    monkeypatch.setattr(sys, "argv", ["kprune_glue.py", *options.split()])
    kprune_glue.main()
    assert "eval_accuracy" in capsys.readouterr().out
    report = load_report(tmp_path / "out")
    assert report.flops <= 0.5 * report.flops_before
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "modeling_kprune_ext.py").exists()
    assert (tmp_path / "out" / "checkpoint-2" / "kprune_report.json").exists()


def test_glue_without_data(model, tmp_path, monkeypatch) -> None:
    arguments = ["kprune_glue.py", "--model", str(model), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="Pass --task"):
        kprune_glue.main()


def test_distillation(model, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "texts.jsonl").write_text(rows(160, "text"))
    options = (
        f"--model {model} --data {tmp_path}/texts.jsonl --reduction 0.8 --steps 80 "
        f"--batch-size 16 --learning-rate 5e-4 --output {tmp_path}/out"
    )
    monkeypatch.setattr(sys, "argv", ["kprune_distillation.py", *options.split()])
    kprune_distillation.main()
    line = capsys.readouterr().out.splitlines()[-1]
    before, after = map(float, re.findall(r"\d+\.\d+", line))
    assert 0 < after < before
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(value).all() for value in loaded.state_dict().values())
