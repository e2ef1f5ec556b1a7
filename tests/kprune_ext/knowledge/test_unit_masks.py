"""Hooks come off again, whatever happens."""

from __future__ import annotations

import pytest
import torch

from kprune_ext.architectures.table import find_architecture
from kprune_ext.knowledge.unit_masks import unit_masks
from kprune_ext.model_layers.hooks import evaluating, stopping_before, watching
from kprune_ext.units.sublayers import sublayers
from tests.helpers.kprune import assert_same_state, padded, sequences, state_of, tiny_bert


def parts(model: torch.nn.Module) -> list:
    return sublayers(model, find_architecture(model))


def test_everything_is_restored_after_an_error() -> None:
    model = tiny_bert().train()
    model.bert.pooler.eval()
    before = state_of(model)
    layer = model.bert.encoder.layer[0]
    with pytest.raises(KeyError, match="on purpose"), evaluating(model):
        assert not any(module.training for module in model.modules())
        with watching(parts(model)[0]), unit_masks(parts(model), 2), stopping_before(layer):
            raise KeyError("on purpose")
    assert_same_state(before, state_of(model))


def test_masks_of_ones_change_nothing_and_zeros_remove_a_unit() -> None:
    model, batch = tiny_bert(), padded(sequences(4))[0]
    plain = model(**batch).logits
    attention = parts(model)[0]
    with unit_masks([attention], 4) as masked:
        assert torch.equal(model(**batch).logits, plain)
        with torch.no_grad():
            masked[0].mask[:, 1] = 0
        without = model(**batch).logits
    size = attention.unit_size
    with torch.no_grad():
        attention.output.weight[:, size : 2 * size] = 0
    torch.testing.assert_close(model(**batch).logits, without)


def test_watching_sees_features_and_output() -> None:
    model, batch = tiny_bert(), padded(sequences(4))[0]
    ffn = parts(model)[1]
    with watching(ffn) as flow:
        model(**batch)
    features, output = flow.taken()
    torch.testing.assert_close(ffn.output(features), output)
    assert features.shape[-1] == ffn.units


def test_watching_nothing_is_an_error() -> None:
    with watching(parts(tiny_bert())[0]) as flow, pytest.raises(RuntimeError, match="No forward"):
        flow.taken()


def test_a_forward_pass_stops_before_a_layer() -> None:
    model, batch = tiny_bert(), padded(sequences(4))[0]
    with stopping_before(model.bert.encoder.layer[1]) as calls:
        model(**batch)
        raise AssertionError("the pass went on")
    assert len(calls) == 1
    assert calls[0][0][0].shape[:2] == batch["input_ids"].shape
