"""The language model of the demo: pruned, and generated with by transformers alone."""

from __future__ import annotations

import json
import sys

import kprune_language_model
import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kprune_ext import load_report
from tests.helpers.text import save_tiny_model

TEXTS = [f"The shop sells {n} apples for {n + 2} dollars and {n + 5} pears." for n in range(40)]


@pytest.fixture
def command(tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    arguments = ["kprune_language_model.py", "--model", str(tmp_path / "model")]
    arguments += ["--data", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "out")]
    arguments += ["--reduction", "0.25", "--prompt", "The shop sells"]
    monkeypatch.setattr(sys, "argv", arguments)
    return arguments


@pytest.mark.filterwarnings("ignore:The calibration data have:UserWarning")
def test_the_pruned_model_generates_without_the_package(command, tmp_path, capsys) -> None:
    kprune_language_model.main()
    printed = capsys.readouterr().out
    for name in ("dense", "pruned"):
        assert f"{name} (LlamaForCausalLM): The shop sells" in printed
    folder = tmp_path / "out" / "pruned"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    report = load_report(folder)
    assert model.num_parameters() == report.parameters < report.parameters_before
    assert "kprune" not in (folder / "config.json").read_text()


def test_a_folder_that_does_not_load_ends_the_demo(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="transformers could not load"):
        kprune_language_model.in_stock_transformers(tmp_path, "a")
