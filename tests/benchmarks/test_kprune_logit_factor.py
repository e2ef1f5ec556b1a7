"""The benchmark of the factor on logits in a tiny setting."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.kprune import logits
from benchmarks.kprune.tasks import TASKS


def test_what_a_factor_on_the_logits_does(data: Path, folders: list[str]) -> None:
    arguments = [
        *folders,
        "--epochs=1",
        "--tokens",
        "150",
        "--reduction=0.5",
        "--results",
        str(data / "r"),
    ]
    logits.main([*arguments, "--task=mrpc", "--seeds", "0", "1"])
    path = data / "r" / "kprune_logits.json"
    before = path.read_bytes()
    for run in json.loads(before)["runs"]:
        one, other = run["with"], run["without"]
        assert one["f1"] == other["f1"] and one["agreement"] == other["agreement"]
        assert run["scale"] > 0 and run["dense"]["divergence"] == 0
    logits.main([*arguments, "--task=mrpc", "--seeds", "0", "1"])
    assert path.read_bytes() == before
    row = (data / "r" / "kprune_logits.md").read_text().splitlines()[-1]
    assert row.startswith("| mrpc, 50% | 150 | 2 |") and "±" in row


def test_predictions_compared() -> None:
    dense = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    rows = [{"label": 0}, {"label": 0}]
    found = logits.compared(dense.flip(1), dense, rows, TASKS["mrpc"])
    assert found["agreement"] == 0 and found["accuracy"] == 50
    # KL between (p, 1 - p) and its reverse is (2 p - 1) times the difference of the logits
    expected = [(2 / (1 + math.exp(-gap)) - 1) * gap for gap in (2, 1)]
    assert found["divergence"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    loss = [math.log(1 + math.exp(2)), math.log(1 + math.exp(-1))]
    assert found["loss"] == pytest.approx(sum(loss) / 2, rel=1e-5)
