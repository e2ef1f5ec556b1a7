"""The benchmark of costs in a tiny setting."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.kprune import cost


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_costs_of_the_papers_way_and_of_each_default(
    data: Path,
    folders: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        *folders,
        "--tokens=150",
        "--epochs=1",
        "--reduction=0.5",
        "--results",
        str(data / "results"),
    ]

    def in_this_process(module: str, given: list[str], name: str) -> dict:
        cost.main([*given, "--one", name])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(cost, "in_child", in_this_process)
    cost.main(arguments)
    report = json.loads((data / "results" / "kprune_cost.json").read_text())
    forward, paper, once, fewer, default = report["runs"]
    assert forward["tokens"] == paper["tokens"] == default["tokens"] <= 150
    assert paper["options"]["schedule"] == "per_sublayer" and once["options"]["ridge"] == 0
    assert fewer["options"]["score_fraction"] == default["options"]["score_fraction"] < 1
    assert default["options"]["ridge"] is None
    text = (data / "results" / "kprune_cost.md").read_text()
    assert "| paper | " in text and "One forward pass" in text and str(data) not in text
