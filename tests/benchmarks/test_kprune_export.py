"""The benchmark of exported models in a tiny setting."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.kprune import export


def test_exported_models_are_timed(data: Path, folders: list[str]) -> None:
    arguments = [*folders, "--tokens=150", "--rounds=1", "--epochs=1", "--reductions", "0.5"]
    export.main([*arguments, "--results", str(data / "results")])
    report = json.loads((data / "results" / "kprune_export.json").read_text())
    assert [(run["batch"], run["tokens"]) for run in report["runs"]] == [(32, 64), (1, 64)]
    for run in report["runs"]:
        assert run["logits_apart"] < 1e-4
        assert export.speedup(run["onnxruntime"]) > 0
