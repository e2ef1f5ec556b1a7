"""The copy that is pruned shares what is not pruned yet with the model that was given."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import kprune_ext.pruning
from kprune_ext import KPruneConfig, kprune
from kprune_ext.model_layers.device_map import own_weights
from kprune_ext.preparation.run import copied_student
from tests.helpers.kprune_models import FAMILIES, batches_for, tiny


def storages(model: nn.Module) -> dict[str, int]:
    every = model.named_parameters(remove_duplicate=False)
    return {name: p.untyped_storage().data_ptr() for name, p in every if p.numel()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_shares_and_the_result_does_not(family, monkeypatch) -> None:
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = copied_student(model, KPruneConfig(), None, None).whole
    assert storages(copied) == storages(model)
    shared = []
    advance = kprune_ext.pruning.advance

    def noted(run, target, inputs):
        shared.append(len({*storages(run.whole).values()} & {*storages(run.model).values()}))
        advance(run, target, inputs)

    monkeypatch.setattr(kprune_ext.pruning, "advance", noted)
    pruned = kprune(model, batches_for(family), KPruneConfig(reduction=0.3), progress=False)
    assert not {*storages(pruned).values()} & {*storages(model).values()}
    assert all(a > b > 0 for a, b in pairwise(shared))  # each gets its own
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_their_own_are_left() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    weight = other.weight.untyped_storage().data_ptr()
    other.bias = nn.Parameter(model.bias.detach())
    own_weights(other, model)
    assert other.weight.untyped_storage().data_ptr() == weight
    assert torch.equal(other.bias, model.bias)
    assert other.bias.untyped_storage().data_ptr() != model.bias.untyped_storage().data_ptr()
