"""The benchmark of adapters after pruning in a tiny setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kprune import recovery


def recover(data: Path, folders: list[str], *more: str) -> dict:
    results = data / "results"
    fixed = ["--tokens=150", "--rank=2", "--rounds=1", "--epochs=1", "--reductions", "0.5"]
    recovery.main([*folders, *fixed, "--results", str(results), *more])
    return json.loads((results / "kprune_recovery.json").read_text())


def test_recovery_trains_each_adapter_and_resumes(data: Path, folders: list[str]) -> None:
    report = recover(data, folders, "--rates", "1e-3", "--after", "none", "corda")
    assert [run["after"] for run in report["runs"]] == ["none", "none", "corda"]
    pruned, adapted = report["runs"][1:]
    assert adapted["parameters"] == pruned["parameters"] and adapted["trained"] > 0
    more = recover(data, folders, "--rates", "1e-3", "--after", "none", "corda", "lora")
    assert more["runs"][:3] == report["runs"] and more["runs"][3]["after"] == "lora"
    assert more["runs"][3]["trained"] == adapted["trained"]


def test_recovery_refuses_results_with_other_settings(data: Path, folders: list[str]) -> None:
    recover(data, folders, "--after", "none")
    with pytest.raises(SystemExit, match="has other settings"):
        recover(data, folders, "--after", "none", "--adapter-epochs", "2")


def test_the_rate_is_chosen_by_validation_not_by_test() -> None:
    run = {"reduction": 0.6, "after": "lora", "seed": 0}
    runs = [run | {"rate": 1.0, "validation": 80.0, "test": 99.0}]
    runs += [run | {"rate": 2.0, "validation": 81.0, "test": 10.0, "seed": s} for s in (0, 1)]
    assert recovery.best_rates(runs) == [runs[1:]]
