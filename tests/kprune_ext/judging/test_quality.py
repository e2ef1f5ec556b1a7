"""What a report says about a pruned model's outputs, accuracy, size and speed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from torch import Tensor

from kprune_ext import KPruneConfig, KPruneReport, kprune
from kprune_ext.cli.main import main
from kprune_ext.command_inputs.inputs import text_batches
from kprune_ext.judging import speed
from kprune_ext.report.agreement import decided, fitting_labels, no_sums, quality_from, sums_of
from tests.helpers.kprune import padded, run, sequences, tiny_bert, word_tokenizer
from tests.helpers.kprune_decoders import decoder_batches, tiny_decoder
from tests.helpers.kprune_models import batches_for, tiny


def logits_of(model: Any, batches: Any) -> Tensor:
    inputs = ({n: v for n, v in batch.items() if n != "labels"} for batch in batches)
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in inputs])


def labelled(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches with random labels of 3 classes, one of them unknown."""
    generator = torch.Generator().manual_seed(3)
    for batch in batches:
        batch["labels"] = torch.randint(3, (len(batch["input_ids"]),), generator=generator)
    batches[0]["labels"][0] = -100
    return batches


def test_classes_and_labels_on_the_calibration_data() -> None:
    model, batches = tiny_bert(), labelled(padded(sequences()))
    pruned = run(model, batches, reduction=0.5)
    old, new = logits_of(model, batches).argmax(1), logits_of(pruned, batches).argmax(1)
    labels = torch.cat([batch["labels"] for batch in batches])
    quality = pruned.kprune_report.quality
    assert (quality.measure, quality.count, quality.held_out) == ("classes", 24, False)
    assert quality.agreement == pytest.approx(float((old == new).double().mean()))
    assert quality.labelled == 23
    assert quality.accuracy == pytest.approx(float((new == labels).sum()) / 23)
    assert quality.accuracy_before == pytest.approx(float((old == labels).sum()) / 23)
    said = str(pruned.kprune_report)
    assert (
        f"on the calibration data: the same class as the original in {quality.agreement:.1%}"
        in said
    )
    assert f"accuracy on 23 labels of the calibration data: {quality.accuracy:.1%}, before" in said


def test_labels_change_nothing_but_the_report() -> None:
    plain, known = padded(sequences()), labelled(padded(sequences()))
    one, other = run(tiny_bert(layers=1), plain), run(tiny_bert(layers=1), known)
    weights = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert one.kprune_report.quality.accuracy is None


@pytest.mark.parametrize(
    "labels", [torch.full((24,), 7), torch.zeros(24, 9), ["good"] * 24, torch.rand(24)]
)
def test_labels_of_another_task_give_no_accuracy(labels: Any) -> None:
    (batch,) = padded(sequences(), batch=24)
    quality = run(tiny_bert(layers=1), [{**batch, "labels": labels}]).kprune_report.quality
    assert quality.accuracy is None and quality.count == 24


def test_an_encoder_is_judged_on_held_out_samples_if_it_is_asked_to() -> None:
    model, batches = tiny_bert(layers=1), labelled(padded(sequences(40)))
    report = run(model, batches, held_out=0.2).kprune_report
    assert report.samples == 32 and report.quality.held_out and report.quality.count == 8
    assert "on held-out data: the same class" in str(report)
    # By default all samples are pruned on, as before.
    assert run(model, batches).kprune_report.samples == 40


def test_embeddings_are_compared_by_their_angle() -> None:
    model, batches = tiny("bert", "embeddings"), batches_for("bert")
    pruned = run(model, batches)
    cosines = []
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"].unsqueeze(2)
            pooled = [(m(**batch).last_hidden_state * mask).sum(1) for m in (model, pruned)]
            cosines.append(torch.cosine_similarity(*pooled))
    quality = pruned.kprune_report.quality
    assert quality.measure == "cosine"
    assert quality.agreement == pytest.approx(float(torch.cat(cosines).mean()), abs=1e-5)


def test_numbers_are_compared_by_their_correlation() -> None:
    model, batches = tiny_bert(labels=1), padded(sequences())
    pruned = run(model, batches)
    pair = torch.stack([logits_of(m, batches).flatten() for m in (model, pruned)])
    quality = pruned.kprune_report.quality
    assert quality.measure == "correlation"
    assert quality.agreement == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-4)


@pytest.mark.parametrize("held_out", [None, 0.0])
def test_next_tokens(held_out: float | None) -> None:
    report = run(tiny_decoder("llama"), decoder_batches(), held_out=held_out).kprune_report
    assert report.quality.measure == "tokens" and 0 < report.quality.agreement <= 1
    assert report.quality.held_out == (held_out is None)
    if held_out is None:
        assert report.quality.count == report.held_out_tokens
    else:
        assert report.quality.count == sum(int((b["attention_mask"].sum(1) - 1).sum())
                                           for b in decoder_batches())  # fmt: skip


def test_sums_of_batches_add_up_and_labels_of_several_kinds_fit() -> None:
    logits = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    old, new = decided(logits, "multi_label_classification"), decided(-logits, "regression")
    counted = torch.tensor([[True, False]] * 6)
    assert quality_from(no_sums(), "classes", held_out=True) is None
    whole = sums_of(old, ~old, counted, old.long())
    parts = [sums_of(old[p], ~old[p], counted[p], old[p].long()) for p in (slice(2), slice(2, 6))]
    assert torch.equal(whole, sum(parts))
    found = quality_from(whole, "labels", held_out=True)
    assert found is not None and (found.agreement, found.accuracy_before, found.count) == (0, 1, 18)
    assert fitting_labels(torch.zeros(6, 2, 3), old) is not None
    assert fitting_labels(torch.zeros(6, 2), old) is None and fitting_labels(old, new) is None


def test_speed_and_size(monkeypatch) -> None:
    model = tiny_bert(layers=1, neurons=400)
    report = run(model, padded(sequences()), measure_speed=True).kprune_report
    assert report.weight_bytes_before == 4 * model.num_parameters()
    assert report.weight_bytes == 4 * report.parameters
    found = report.speed
    assert found.seconds > 0 and found.batch_size >= 1 and found.length == 7
    assert found.factor == pytest.approx(found.seconds_before / found.seconds)
    assert "times as fast; cpu" in str(report) and " kB)" in str(report)
    again = run(model, padded(sequences()), measure_speed=False).kprune_report
    assert again.speed is None and again == report  # a time is no property of the model

    def full(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(speed, "_measured", full)
    assert run(model, padded(sequences()), measure_speed=True).kprune_report.speed is None


def test_figures_are_in_the_files_the_card_and_the_command(tmp_path, capsys) -> None:
    pruned = kprune(
        tiny_bert(), labelled(padded(sequences())), KPruneConfig(reduction=0.5), progress=False
    )
    report = pruned.kprune_report
    pruned.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "kprune_report.json").read_text())
    assert stored["quality"]["agreement"] == report.quality.agreement and stored["speed"]["seconds"]
    assert KPruneReport.from_dict(stored) == report
    card = (tmp_path / "README.md").read_text()
    assert "- Accuracy on 23 labels of the calibration data" in card and "- Weights: " in card
    assert ModelCard(card).data["metrics"] == ["accuracy"]
    main(["report", str(tmp_path)])
    assert "on the calibration data: the same class" in " ".join(capsys.readouterr().out.split())
    # A report of an earlier version has none of it.
    for name in ("quality", "speed", "weight_bytes", "weight_bytes_before"):
        del stored[name]
    old = KPruneReport.from_dict(stored)
    assert old.quality is None and old.speed is None and "MB" not in old.summary()


@pytest.mark.parametrize(
    "damage",
    [
        {"quality": [1]},
        {"quality": {"measure": "guess", "agreement": 1, "count": 1, "held_out": True}},
        {"quality": {"measure": "classes", "agreement": "all", "count": 1, "held_out": True}},
        {"quality": {"measure": "classes", "agreement": 1, "count": 1, "held_out": 3}},
        {"speed": {"seconds": 0, "seconds_before": 1, "batch_size": 1, "length": 1, "device": ""}},
        {"speed": {"seconds": 1}},
        {"weight_bytes": -1},
    ],
)
def test_damaged_figures(damage: dict[str, Any]) -> None:
    values = run(tiny_bert(layers=1), padded(sequences(8))).kprune_report.to_dict()
    with pytest.raises((ValueError, TypeError)):
        KPruneReport.from_dict(values | damage)


def test_labels_beside_texts(tmp_path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    texts = [f"word{number} word{number % 5} word{number % 3}" for number in range(24)]
    rows = Dataset.from_dict({"text": texts, "label": [number % 3 for number in range(24)]})
    quality = kprune(
        tiny_bert(), rows, KPruneConfig(measure_speed=False), tokenizer=tokenizer, progress=False
    ).kprune_report.quality
    assert quality.labelled == 24 and quality.accuracy is not None


def test_the_command_reads_a_column_of_labels(tmp_path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    options: Any = SimpleNamespace(text_field="text", max_length=8, batch_size=3)
    rows = Dataset.from_dict({"text": ["word1", "word2", None, "word3"], "label": [2, None, 1, 0]})
    batches = list(text_batches(rows, tokenizer, options, tiny_bert().config))
    assert [batch["labels"].tolist() for batch in batches] == [[2, -100], [0]]
    words = rows.remove_columns("label").add_column("label", ["a", "b", "c", "d"])
    assert all(
        "labels" not in b for b in text_batches(words, tokenizer, options, tiny_bert().config)
    )
