"""What keeps memory in one piece is in force where it helps, and taken back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kprune_ext import KPruneConfig, kprune
from kprune_ext.common.memory import without_onednn
from tests.helpers.kprune import padded, sequences, tiny_bert

onednn = torch.backends.mkldnn


@pytest.mark.parametrize("before", [True, False])
def test_full_precision_runs_without_onednn(before: bool, monkeypatch) -> None:
    monkeypatch.setattr(onednn, "enabled", before)
    with without_onednn(nn.Linear(2, 2)):
        assert not onednn.enabled
    assert onednn.enabled is before


def test_onednn_is_back_after_an_error() -> None:
    assert onednn.enabled
    with pytest.raises(ValueError), without_onednn(nn.Linear(2, 2, dtype=torch.float64)):
        raise ValueError
    assert onednn.enabled


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2, dtype=torch.bfloat16),
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float16)),
        nn.Linear(2, 2, device="meta"),
        nn.Identity(),
    ],
    ids=["bfloat16", "mixed", "elsewhere", "no weights"],
)
def test_others_keep_it(model: nn.Module) -> None:
    with without_onednn(model):
        assert onednn.enabled


def test_frozen_flags_are_respected(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends, "flags_frozen", lambda: True)
    with without_onednn(nn.Linear(2, 2)):
        assert onednn.enabled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruning_runs_without_onednn(dtype: torch.dtype) -> None:
    seen = []

    def predict(model, batch):
        seen.append(onednn.enabled)
        return model(**batch).logits

    model = tiny_bert(dtype=dtype)
    config = KPruneConfig(measure_speed=False)
    kprune(model, padded(sequences()), config, predict=predict, progress=False)
    # The comparison of the copy with the model comes before.
    first = seen.index(False) if dtype == torch.float32 else len(seen)
    assert first > 0 and not any(seen[first:]) and len(seen) > 10
    assert onednn.enabled
