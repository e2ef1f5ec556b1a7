"""The study of embedders in a tiny setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.kprune import embedders
from benchmarks.kprune.accuracy import label
from benchmarks.kprune.embedder_data import read_pairs, read_sentences, shuffled
from benchmarks.kprune.embedder_signals import SIGNALS, prediction
from benchmarks.kprune.embedder_training import distilled, geometry_loss
from tests.helpers.kprune import tiny_bert, word_tokenizer


def study(data: Path, *more: str) -> dict:
    folders = ["--data", str(data), "--models", str(data / "model"), "--results", str(data / "out")]
    sizes = ["--reductions", "0.5", "--tokens", "150", "--seeds", "0", "--rounds", "1"]
    embedders.main([*folders, *sizes, "--in-process", *more])
    return json.loads((data / "out" / "kprune_embedders.json").read_text())


def test_every_method_is_scored_distilled_and_resumed(pair_data: Path) -> None:
    given = ["--distill-minutes", "0.005", "--rate", "1e-2", "--pairs", "8", "--other-pairs", "8"]
    report = study(pair_data, *given)
    dense, *runs = report["runs"]
    assert dense["method"] == "dense" and set(dense["scores"]) == {
        "stsb", "mrpc", "qnli", "cpu_seconds",
    }  # fmt: skip
    assert [run["method"] for run in runs] == ["ours", "fisher_mask", "magnitude"]
    assert "distilled_scores" not in runs[2]
    for run in runs[:2]:
        assert run["flops_kept"] <= 0.5 and -1 <= run["scores"]["cosine"] <= 1
        assert run["distillation"]["steps"] > 0 and run["latency_1"]["speedup"] > 0
        assert set(run["distilled_scores"]) == set(run["scores"]) > set(dense["scores"])
    table = (pair_data / "out" / "kprune_embedders.md").read_text()
    assert "| 50% | ours, distilled | 0.0 | 0.01 |" in table and str(pair_data) not in table
    assert (pair_data / "out" / "kprune_embedders.png").stat().st_size > 1000
    assert study(pair_data, *given)["runs"] == report["runs"]


def test_what_was_kept_is_distilled_without_being_pruned_again(
    pair_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--methods", "ours", "--pairs", "8", "--other-pairs", "8", "--rounds", "0"]
    given += ["--pruned-models", str(pair_data / "kept")]
    _, pruned = study(pair_data, *given)["runs"]
    monkeypatch.setattr(embedders, "kprune", lambda *_, **__: pytest.fail("pruned again"))
    runs = study(pair_data, *given, "--distill-minutes", "0.005")["runs"]
    assert runs[1] == pruned and runs[2]["scores"] == pruned["scores"]
    assert runs[2]["distillation"]["steps"] > 0 and "distilled_scores" in runs[2]
    assert (pair_data / "kept" / "model-ours-0.5-150-0-distilled-0.005-0.0001").is_dir()
    table = (pair_data / "out" / "kprune_embedders.md").read_text().splitlines()
    cells = [line.split(" | ")[4] for line in table if "| 50% |" in line]
    assert cells == ["ours", "ours, distilled"]


def test_every_signal_prunes_and_is_told_apart(pair_data: Path) -> None:
    given = ["--methods", "ours", "--pairs", "8", "--other-pairs", "8", "--rounds", "0"]
    for signal in SIGNALS:
        report = study(pair_data, *given, "--signal", signal)
    assert [label(run) for run in report["runs"]] == [
        "dense", "ours", "ours signal=directions", "ours signal=similarities",
    ]  # fmt: skip
    cosines = [run["scores"]["cosine"] for run in report["runs"][1:]]
    assert len(set(cosines)) > 1 and min(cosines) > 0


def test_similarities_are_cosines_to_the_dense_model(pair_data: Path) -> None:
    dense, tokenizer = tiny_bert().bert.eval(), word_tokenizer(pair_data)
    sentences = read_sentences(pair_data)[:20]
    predict = prediction("similarities", dense, tokenizer, sentences)
    batch = dict(tokenizer(sentences[:1], return_tensors="pt"))
    found = predict(dense, batch)
    assert found.shape == (1, 20) and float(found[0, 0].detach()) == pytest.approx(1, abs=1e-5)
    assert float(found.detach().abs().max()) <= 1 + 1e-5
    direction = prediction("directions", dense, tokenizer, sentences)(dense, batch)
    assert float(direction.detach().norm()) == pytest.approx(1, abs=1e-5)
    assert prediction("vectors", dense, tokenizer, sentences) is None


def test_pairs_and_sentences(pair_data: Path) -> None:
    pairs, some = (read_pairs(pair_data, "qnli", most) for most in (None, 5))
    rows = (pair_data / "qnli" / "validation.jsonl").read_text().splitlines()
    first = json.loads(rows[0])
    assert pairs.texts[pairs.first[0]] == first["question"] and len(pairs.alike) == len(rows)
    assert pairs.alike.tolist()[:2] == [0, -1] and len(some.alike) == 5
    sentences = read_sentences(pair_data)
    assert len(set(sentences)) == len(sentences) > 100
    assert shuffled(sentences, 0) == shuffled(sentences, 0) != shuffled(sentences, 1)


def test_distillation_brings_embeddings_back(pair_data: Path) -> None:
    dense, model = (tiny_bert(seed=seed).bert for seed in (0, 1))
    table, tokenizer = model.embeddings.word_embeddings.weight.clone(), word_tokenizer(pair_data)
    sentences = read_sentences(pair_data)
    how = {"minutes": 0.02, "rate": 1e-2, "seed": 0, "threads": 1}
    took = distilled(model, dense, tokenizer, sentences, **how)
    assert took["steps"] > 4 and took["minutes"] >= 0.02
    assert took["loss_after"] < 0.9 * took["loss_before"]
    assert torch.equal(model.embeddings.word_embeddings.weight, table)


def test_the_loss_is_about_directions_alone() -> None:
    wanted = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert float(geometry_loss(3 * wanted, wanted)) == pytest.approx(0, abs=1e-6)
    assert float(geometry_loss(-wanted, wanted)) == pytest.approx(2, abs=1e-5)
