"""The names by which cards and adapters refer to a pruned model and to its original."""

from __future__ import annotations

import json

from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from kprune_ext import load_report
from tests.helpers.kprune import padded, run, sequences, tiny_bert

LORA = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}


def base_named_by(adapted) -> str | None:
    return adapted.peft_config["default"].base_model_name_or_path


def test_an_adapter_names_the_pruned_model_once_that_is_saved(tmp_path) -> None:
    pruned = run(tiny_bert(layers=1), padded(sequences(8)))
    for name in ("first", "pruned"):  # the last folder counts: Trainers save checkpoints in between
        pruned.save_pretrained(tmp_path / name)
    adapted = get_peft_model(pruned, LoraConfig(**LORA))
    assert base_named_by(adapted) == str(tmp_path / "pruned")
    adapted.save_pretrained(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(stored["base_model_name_or_path"])
    PeftModel.from_pretrained(base, tmp_path / "adapter")
    # A model that was loaded keeps its name, as in transformers.
    base.save_pretrained(tmp_path / "elsewhere")
    assert base.name_or_path == str(tmp_path / "pruned")


def test_the_card_names_the_model_that_was_pruned(tmp_path) -> None:
    model = tiny_bert(layers=1)
    model.name_or_path = "somebody/a-bert"
    run(model, padded(sequences(8))).save_pretrained(tmp_path / "once")
    once = AutoModelForSequenceClassification.from_pretrained(tmp_path / "once")
    twice = run(once, padded(sequences(8)), reduction=0.2)
    twice.save_pretrained(tmp_path / "twice")
    for name in ("once", "twice"):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data["base_model"] == "somebody/a-bert"
        assert load_report(tmp_path / name).original == "somebody/a-bert"


def test_a_path_is_not_told_to_others(tmp_path) -> None:
    tiny_bert(layers=1).save_pretrained(tmp_path / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    pruned = run(model, padded(sequences(8)))
    pruned.save_pretrained(tmp_path / "pruned")
    assert pruned.kprune_report.original is None
    assert str(tmp_path) not in (tmp_path / "pruned" / "README.md").read_text()


def test_a_report_says_that_tokens_were_few() -> None:
    few = run(tiny_bert(layers=1, neurons=400), padded(sequences(8))).kprune_report
    assert few.tokens < few.widest == 400
    assert "fewer than the 400 inputs of a fitted layer: expect less" in repr(few)
    assert "fewer" not in repr(run(tiny_bert(layers=1), padded(sequences(24))).kprune_report)
