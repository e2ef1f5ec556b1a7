"""The metrics of the tasks against answers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kprune.tasks import accuracy_and_f1, answer_scores, spearman


def test_metrics() -> None:
    accuracy = accuracy_and_f1(
        [torch.tensor(z) for z in ([0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0])],
        [{"label": label} for label in (1, 0, 0, 1)],
    )
    assert accuracy == {"accuracy": 50.0, "f1": 50.0}
    rows = [{"score": score} for score in (1.0, 2.0, 2.0, 5.0)]
    values = [torch.tensor([value]) for value in (0.1, 0.2, 0.2, 0.9)]
    assert spearman(values, rows)["spearman"] == pytest.approx(100)
    assert spearman(values[::-1], rows)["spearman"] == pytest.approx(-100)
    wanted = [{"answers": {"text": ["the Eiffel tower", "tower"]}}, {"answers": {"text": ["x"]}}]
    found = answer_scores(["Eiffel Tower!", "y"], wanted)
    assert found == {"f1": 50.0, "exact_match": 50.0}
