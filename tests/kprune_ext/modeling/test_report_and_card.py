"""What is saved beside a pruned model: its report and its card, in a folder and on a hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from kprune_ext import KPruneConfig, kprune, load_report
from kprune_ext.checkpoint_files import model_card, saved
from tests.helpers.kprune import padded, sequences, tiny_bert
from tests.helpers.kprune_checkpoints import contents, load


def test_the_report_is_kept_or_made_from_the_sizes(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path)
    report = pruned.kprune_report
    assert load_report(tmp_path) == load_report(load(tmp_path)) == load_report(pruned) == report
    (tmp_path / "kprune_report.json").unlink()
    assert load(tmp_path).kprune_report is None
    length = report.sequence_length
    for made in (load_report(tmp_path, length), load_report(load(tmp_path), length)):
        assert (made.flops, made.flops_before) == (report.flops, report.flops_before)
        assert (made.parameters, made.parameters_before) == (
            report.parameters,
            report.parameters_before,
        )
        for one, other in zip(made.sublayers, report.sublayers, strict=True):
            assert one.error is None
            assert one.__dict__ | {"error": other.error} == other.__dict__
        assert "–" in str(made) and "calibrated" not in str(made)
        made.save_json(tmp_path / "made.json")
        assert type(made).load_json(tmp_path / "made.json") == made
        made.plot(tmp_path / "made.png")


def test_a_report_made_after_two_prunings_is_about_the_original(tmp_path) -> None:
    """The run's own budget and report are relative to the model it was given."""
    model, batches = tiny_bert(neurons=80), padded(sequences())
    config = KPruneConfig(reduction=0.3)
    once = kprune(model, batches, config, progress=False)
    once.save_pretrained(tmp_path / "once")
    once = load(tmp_path / "once")
    twice = kprune(once, batches, config, progress=False)
    report = twice.kprune_report
    assert report.flops_before == once.kprune_report.flops
    assert report.flops <= 0.7 * once.kprune_report.flops
    twice.kprune_report = None
    made = load_report(twice, report.sequence_length)
    assert made.flops == report.flops
    assert made.flops_before == once.kprune_report.flops_before
    assert made.parameters_before == model.num_parameters()


def test_no_report_of_a_dense_model(tmp_path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        with pytest.raises(ValueError, match="was not pruned by kprune_ext"):
            load_report(source)
    with pytest.raises(ValueError, match="sequence_length=0 is too small"):
        load_report(model, 0)


def test_another_models_report_is_left_out(pruned, tmp_path, caplog) -> None:
    pruned.save_pretrained(tmp_path)
    other = kprune(tiny_bert(), padded(sequences()), KPruneConfig(reduction=0.8), progress=False)
    other.kprune_report.save_json(tmp_path / "kprune_report.json")
    assert load(tmp_path).kprune_report is None
    assert "with other sizes" in caplog.text


def test_the_card_has_the_table_and_keeps_the_rest(pruned, tmp_path) -> None:
    pruned.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data["library_name"] == "transformers" and "kprune" in card.data["tags"]
    assert card.data["pipeline_tag"] == "text-classification"
    assert card.data.get("base_model") is None and "metrics" not in card.data.to_dict()
    report = pruned.kprune_report
    assert f"- Parameters: {report.parameters:,} of {report.parameters_before:,}." in card.text
    assert "pip install peft-corda" not in card.text
    row = report.sublayers[0]
    assert f"| 0 | {row.units} / {row.units_before} |" in card.text
    assert "import kprune_ext" in card.text and "trust_remote_code" not in card.text
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text
    own = (tmp_path / "README.md").read_text().replace("# Pruned model", "# Mine\r\nText\r\n")
    (tmp_path / "README.md").write_text(own, newline="")
    pruned.save_pretrained(tmp_path, self_contained=True)
    after = (tmp_path / "README.md").read_bytes().decode()
    assert "# Mine\r\nText\r\n" in after and after.count("kprune_ext: start") == 1
    assert "trust_remote_code" in after


def test_the_card_names_the_original_and_what_was_measured(pruned, tmp_path) -> None:
    held_out = {"perplexity": 12.5, "perplexity_before": 10.25, "held_out_tokens": 2000}
    report = dataclasses.replace(pruned.kprune_report, **held_out)
    auto = "AutoModelForCausalLM"
    facts = model_card.card_facts("org/name", auto, report)
    assert facts == model_card.CardFacts("org/name", "text-generation", ("perplexity",))
    text = model_card.new_card(model_card.pruning_section(report, auto, None), facts)
    data = ModelCard(text).data
    assert (data["base_model"], data["metrics"]) == ("org/name", ["perplexity"])
    assert "Perplexity on 2,000 held-out tokens: 12.50, before 10.25." in text
    for local in (str(tmp_path), "/home/me/model", ""):
        assert model_card.card_facts(local, auto, report).base_model is None


def test_push_to_hub(pruned, tmp_path, monkeypatch) -> None:
    """The hub's client is replaced by one that notes what it would upload."""
    uploads: list[dict[str, Any]] = []
    files: list[dict[str, bytes]] = []

    class Client:
        def __init__(self, token: Any = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

        def upload_folder(self, folder_path: str, **options: Any) -> str:
            uploads.append(options)
            files.append(contents(Path(folder_path)))
            return "commit"

    monkeypatch.setattr(saved, "HfApi", Client)
    card = ModelCard("---\nlicense: mit\n---\n\n# Remote card\n")
    monkeypatch.setattr(ModelCard, "load", classmethod(lambda *_, **__: card))
    assert pruned.push_to_hub("name", self_contained=True, revision="branch") == "commit"
    assert uploads[0]["repo_id"] == "me/name" and uploads[0]["revision"] == "branch"
    assert "model.safetensors" in files[0] and "modeling_kprune_ext.py" in files[0]
    text = files[0]["README.md"].decode()
    assert "# Remote card" in text and "license: mit" in text and "kprune_ext: start" in text
    pruned.save_pretrained(tmp_path / "local-name", push_to_hub=True, commit_message="two")
    assert uploads[1]["repo_id"] == "me/local-name" and uploads[1]["commit_message"] == "two"
    assert files[1].keys() == contents(tmp_path / "local-name").keys()
