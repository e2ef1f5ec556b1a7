"""The studies of decompositions, on small layers and a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common import corpora
from benchmarks.corda_start import crossover, decomposition, exactness
from tests.helpers.corda import VOCABULARY, make_model


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_both_ways_find_the_same_energy(method: str) -> None:
    found = crossover.measure(64, 8, method, repeats=1)
    assert found["energy"] == pytest.approx(1, abs=1e-2)
    assert set(found["seconds"]) == {"exact", "iterative"}


def test_errors_are_those_of_the_wanted_end() -> None:
    rows = exactness.synthetic_rows(160, seed=0)
    assert {row["subject"] for row in rows} == set(exactness.SUBJECTS)
    assert all(abs(row["error"]) < 1e-2 for row in rows)


def test_norms_of_starting_factors_are_compared_between_calibrations() -> None:
    model = make_model("llama")
    targets = exactness.linear_layers.linear_layers(model)
    windows = torch.randint(3, VOCABULARY, (4, 16))
    rows = exactness.norm_rows(model, targets, {"short": windows[:1], "long": windows})
    ratios = {(row["method"], row["scaling"]): row for row in rows}
    assert ratios["kpm", "balanced"]["apart"]["worst"] == pytest.approx(1, abs=1e-3)
    assert ratios["ipm", "peft"]["apart"]["worst"] > 1


def test_components_are_discarded_and_restored(tmp_path: Path, tiny_model: str) -> None:
    text = "\n".join(corpora.manual())
    (tmp_path / "train.txt").write_text(text[:40_000])
    (tmp_path / "test.txt").write_text(text[40_000:80_000])
    rows = [json.dumps({"question": s, "answer": [s]}) for s in corpora.short_sentences(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:30]))
    (tmp_path / "test.jsonl").write_text("\n".join(rows[30:]))
    paths = [
        str(tmp_path / name) for name in ("train.txt", "test.txt", "train.jsonl", "test.jsonl")
    ]
    given = ["--wikitext", *paths[:2], "--nq", *paths[2:], "--model", tiny_model, "--k", "4", "16"]
    given += ["--length", "32", "--calibration-windows", "4", "--test-windows", "4"]
    decomposition.main([*given, "--threads", "1", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "corda_decomposition.json").read_text())
    assert len(report["runs"]) == 1 + 5 * 2
    assert report["command"].startswith("python -m benchmarks.corda_start.decomposition ")
    assert str(tmp_path) not in (tmp_path / "corda_decomposition.md").read_text()
