"""The benchmark of covariances that pruning hands over, in a tiny setting."""

from __future__ import annotations

import json

from benchmarks.kprune import handover
from tests.benchmarks.test_kprune_decoders import data, model  # noqa: F401


def test_both_ways_run_in_turn_with_the_same_factors(model, data, tmp_path) -> None:  # noqa: F811
    given = ["--data", str(data), "--model", str(model), "--results", str(tmp_path), "--turns", "2"]
    handover.main([*given, "--tokens", "600", "--length", "24", "--rank", "2"])
    report = json.loads((tmp_path / "kprune_handover.json").read_text())
    assert [run["way"] for run in report["runs"]] == ["data", *["covariances"] * 2, "data"]
    assert len({run["tokens"] for run in report["runs"]}) == 1 and report["apart"] < 1e-3
    assert all(run[step]["cpu"] > 0 for run in report["runs"] for step in ("prune", "calibrate"))
    table = (tmp_path / "kprune_handover.md").read_text()
    assert "| covariances handed over |" in table and "2 turn(s)" in table
