"""The study of encoders in a tiny setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.corda_training import encoder


def test_encoder_study_sweeps_and_measures_the_best_rate(data: Path) -> None:
    folders = ["--data", str(data), "--model", str(data / "model")]
    results = data / "results"

    def call(*more: str) -> dict:
        settings = json.dumps({"rank": 2, "examples": 40, "calibration_examples": 16})
        fixed = ["--settings", settings, "--threads", "1", "--results", str(results)]
        encoder.main([*folders, *fixed, *more])
        return json.loads((results / "corda_encoder.json").read_text())

    report = call("--tasks", "sst2", "--rates", "1e-3", "1e-2", "--seeds", "0", "1")
    assert len(report["runs"]) == 4 * 3
    for method in encoder.RATES:
        own = [run for run in report["runs"] if run["method"] == method]
        best = max(own[:2], key=lambda run: run["validation"]["accuracy"])
        measured = [run for run in own if "test" in run]
        assert [run["seed"] for run in measured] == [0, 1]
        assert {run["rate"] for run in measured} == {best["rate"]}
    sizes = {run["trained"] for run in report["runs"] if run["method"] != "full"}
    assert len(sizes) == 1
    assert call("--tasks", "sst2")["runs"] == report["runs"]
    text = (results / "corda_encoder.md").read_text()
    assert "| sst2 | accuracy | ipm |" in text and str(data) not in text
    assert (results / "corda_encoder.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="has other settings"):
        encoder.main([*folders, "--results", str(results)])


def test_encoder_study_goes_on_until_the_best_rate_has_worse_ones_on_both_sides(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, method: str, rate: float, seed: int, args: object) -> tuple:
        value = {"accuracy": -abs(rate - 6e-3)}
        return {"task": name, "rate": rate, "seed": seed, "validation": value}, rate

    monkeypatch.setattr(encoder, "run", run)
    monkeypatch.setattr(encoder, "with_test", lambda record, model, args: record | {"test": model})
    args = encoder.arguments(["--data", str(data), "--seeds", "0", "1"])
    records = encoder.swept("sst2", "full", args)
    swept = [record["rate"] for record in records if record["seed"] == 0]
    assert swept == [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3]  # at most six
    assert [r["test"] for r in records if "test" in r] == [3.2e-3] * 2
    assert [r["rate"] for r in encoder.swept("sst2", "lora", args) if r["seed"] == 0] == [
        1e-3, 2e-3, 4e-3, 8e-3,
    ]  # fmt: skip
