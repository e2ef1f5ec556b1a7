"""The benchmark of `kprune_to` in a tiny setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kprune import search


def test_search_and_sweep_agree_and_a_second_call_does_nothing(
    data: Path, folders: list[str]
) -> None:
    given = [*folders, "--epochs=1", "--tokens=150", "--results", str(data), "--tolerance", "60"]
    given += ["--reductions", "0.2", "0.4", "0.6"]
    search.main([*given, "--seeds", "0"])
    search.main([*given, "--seeds", "0", "1"])
    runs = json.loads((data / "kprune_search.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1]
    for run in runs:
        # Every score is near enough here, so that the largest size to remove is the answer.
        assert run["found"] == run["best"] == 0.6
        assert set(run["tried"]) == {"0.0", "0.4", "0.6"} < set(run["scores"])
        assert all(run["scores"][size] == score for size, score in run["tried"].items())
        assert run["search_seconds"]["cpu"] > 0 < run["sweep_seconds"]["cpu"]
    table = (data / "kprune_search.md").read_text()
    assert "| sample | found | best |" in table and str(data) not in table
    assert (data / "kprune_search.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="has other settings"):
        search.main([*given, "--tolerance", "5"])
