"""The benchmark of accuracy in a tiny setting."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.kprune import accuracy
from benchmarks.kprune.tasks import TASKS


def call(data: Path, folders: list[str], *more: str) -> dict:
    fixed = ["--in-process", "--epochs=1", "--tokens=150", "--rounds=1", "--reductions", "0.5"]
    results = data / "results"
    accuracy.main([*folders, *fixed, "--results", str(results), *more])
    return json.loads((results / "kprune_accuracy.json").read_text())


def test_every_task_and_method_runs_and_a_second_call_does_nothing(
    data: Path, folders: list[str]
) -> None:
    names = list(TASKS)
    report = call(data, folders, "--seeds", "0", "--tasks", *names)
    assert len(report["runs"]) == 4 * (1 + 4)
    for run in report["runs"]:
        lowest = -100 if run["task"] == "stsb" else 0
        assert lowest <= run[TASKS[run["task"]].main] <= 100
        if run["method"] != "dense":
            assert 0.4 < run["flops_kept"] <= 0.5
            assert run["latency_32"]["speedup"] > 0
    text = (data / "results" / "kprune_accuracy.md").read_text()
    assert "fisher_mask" in text and "| squad |" in text
    assert str(data) not in text
    assert (data / "results" / "kprune_accuracy.png").stat().st_size > 1000
    before = (data / "results" / "kprune_accuracy.json").read_bytes()
    call(data, folders, "--seeds", "0", "--tasks", *names)
    assert (data / "results" / "kprune_accuracy.json").read_bytes() == before


def test_runs_that_are_missing_are_added(data: Path, folders: list[str]) -> None:
    call(data, folders, "--seeds", "0", "--tasks", "sst2", "--methods", "ours")
    report = call(data, folders, "--seeds", "0", "1", "--tasks", "sst2", "--methods", "ours")
    assert [run["seed"] for run in report["runs"]] == [0, 0, 1]
    assert "±" in (data / "results" / "kprune_accuracy.md").read_text().splitlines()[-1]
