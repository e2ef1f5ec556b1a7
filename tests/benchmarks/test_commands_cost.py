"""The benchmark of what starting costs, with one quick command."""

from __future__ import annotations

import json

from benchmarks.commands import cost


def test_both_states_take_turns(tmp_path) -> None:
    given = ["--before", str(cost.HERE), "--results", str(tmp_path), "--rounds", "2"]
    cost.main([*given, "--only", "kprune --version"])
    (runs,) = json.loads((tmp_path / "commands_cost.json").read_text())["runs"].values()
    assert [len(runs[state]) for state in cost.STATES] == [2, 2]
    assert all(0 < run["cpu"] < 5 and run["code"] == 0 for state in runs.values() for run in state)
    table = (tmp_path / "commands_cost.md").read_text()
    assert "| `kprune --version` |" in table and "2 processes" in table
    assert (tmp_path / "commands_cost.png").stat().st_size > 1000


def test_code_of_the_given_checkout_runs(tmp_path) -> None:
    (tmp_path / "kprune_ext").mkdir()
    (tmp_path / "kprune_ext" / "__init__.py").write_text("raise SystemExit(7)")
    assert cost.cost_of(tmp_path, cost.STARTED["`import kprune_ext`"])["code"] == 7
