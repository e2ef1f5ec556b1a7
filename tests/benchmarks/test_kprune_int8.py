"""The study of 8 bits in a tiny setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.kprune import embedders, int8
from benchmarks.kprune.embedder_data import scores
from tests.helpers.kprune import tiny_bert


def study(data: Path) -> dict:
    folders = ["--data", str(data), "--models", str(data / "model"), "--results", str(data / "out")]
    sizes = ["--reductions", "0.5", "--tokens", "150", "--pairs", "8", "--other-pairs", "8"]
    int8.main([*folders, *sizes, "--rounds", "1"])
    return json.loads((data / "out" / "kprune_int8.json").read_text())


def test_both_precisions_are_scored_timed_and_resumed(pair_data: Path) -> None:
    report = study(pair_data)
    runs = {(run["reduction"], run["precision"]): run for run in report["runs"]}
    assert set(runs) == {(size, name) for size in (0.0, 0.5) for name in ("float32", "int8")}
    assert runs[0.0, "float32"]["scores"]["cosine"] > 1 - 1e-5
    assert 0.9 < runs[0.0, "int8"]["scores"]["cosine"] < 1 - 1e-7
    for size in (0.0, 0.5):
        assert runs[size, "int8"]["mib"] < runs[size, "float32"]["mib"]
        assert runs[size, "int8"]["speedup_1"] > 0
    assert runs[0.5, "float32"]["mib"] < runs[0.0, "float32"]["mib"]
    table = (pair_data / "out" / "kprune_int8.md").read_text()
    assert "| 50% | int8 |" in table and str(pair_data) not in table
    assert (pair_data / "out" / "kprune_int8.png").stat().st_size > 1000
    assert study(pair_data)["runs"] == report["runs"]
    with pytest.raises(SystemExit, match="has other settings"):
        int8.main(["--data", str(pair_data), "--results", str(pair_data / "out"), "--tokens", "9"])


def test_models_that_the_study_of_embedders_has_kept_are_not_pruned_again(
    pair_data: Path, monkeypatch
) -> None:
    models = ["--pruned-models", str(pair_data / "kept")]
    given = ["--data", str(pair_data), "--models", str(pair_data / "model"), "--seeds", "0"]
    given += ["--results", str(pair_data / "out"), "--in-process", "--methods", "ours"]
    given += ["--reductions", "0.5", "--tokens", "150", "--pairs", "8", "--other-pairs", "8"]
    embedders.main([*given, "--rounds", "0", "--distill-minutes", "0.005", *models])
    monkeypatch.setattr(int8, "kprune", lambda *_, **__: pytest.fail("pruned again"))
    report = json.loads((pair_data / "out" / "kprune_embedders.json").read_text())
    ours = next(run for run in report["runs"] if run["method"] == "ours")
    dense, tokenizer = embedders.loaded(str(pair_data / "model"))
    given = ["--data", str(pair_data), "--tokens", "150", *models]
    for stage, more in (
        ("scores", []),
        ("distilled_scores", ["--distilled-minutes", "0.005"]),
    ):
        args = int8.arguments([*given, *more])
        model = int8.pruned(str(pair_data / "model"), dense, tokenizer, 0.5, args)
        found = scores(model, dense, tokenizer, pair_data, ours["pairs"])
        assert found["cosine"] == pytest.approx(ours[stage]["cosine"], abs=1e-6)
    assert ours["scores"]["cosine"] != ours["distilled_scores"]["cosine"]


def test_files_take_any_shape(tmp_path: Path) -> None:
    model = tiny_bert().bert.eval()
    session = int8.session_of(int8.exported(model, tmp_path)["float32"], 1)
    for shape in ((1, 5), (3, 9)):
        ids = torch.randint(5, model.config.vocab_size, shape)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            wanted = int8.Embedder(model)(**batch)
        torch.testing.assert_close(int8.run(session, batch), wanted, rtol=1e-4, atol=1e-5)
