"""The study of 8 bits in a tiny setting."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks.kprune import embedders, int8, int8_engines
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
    assert "| 50% | onnxruntime | int8 |" in table and str(pair_data) not in table
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


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_programs_take_any_shape(engine: str, tmp_path: Path) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
        pytest.importorskip("nncf")
    model = tiny_bert().bert.eval()
    batches = [batch_of(model, (4, 7)) for _ in range(3)]
    wide, narrow = int8_engines.programs(model, tmp_path, batches, [engine], 1)
    assert (wide.engine, wide.precision, narrow.precision) == (engine, "float32", "int8")
    assert min(narrow.mib, wide.mib) > 0
    for shape in ((1, 5), (3, 9)):
        batch = batch_of(model, shape)
        with torch.no_grad():
            wanted = int8.Embedder(model)(**batch)
        first = wide(batch)
        torch.testing.assert_close(first, wanted, rtol=1e-4, atol=1e-5)
        assert torch.cosine_similarity(narrow(batch), wanted).min() > 0.9
        wide(batch_of(model, shape))  # does not change what was returned before
        torch.testing.assert_close(first, wanted, rtol=1e-4, atol=1e-5)


def batch_of(model, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, model.config.vocab_size, shape)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_missing_engine_is_said_before_the_work(pair_data: Path, monkeypatch) -> None:
    there = {"openvino": object(), "nncf": None}
    monkeypatch.setattr(importlib.util, "find_spec", there.get)
    monkeypatch.setattr(int8, "loaded", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(SystemExit, match="pip install nncf$"):
        int8.main(["--data", str(pair_data), "--engines", "openvino"])
