"""Tokens of the last layer that no prediction depends on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kprune_ext import KPruneConfig, kprune
from kprune_ext.architectures.table import find_architecture
from kprune_ext.calibration.state_memory import StateMemory
from kprune_ext.calibration.streams import start_streams
from kprune_ext.model_layers.layer_stack import LayerStack
from kprune_ext.modeling.classes import model_task
from kprune_ext.samples import read_tokens
from kprune_ext.samples.choice import sample_keys
from kprune_ext.samples.samples import CalibrationData, collect_samples
from kprune_ext.tuning.least_squares import NormalEquations
from tests.helpers.kprune import padded, sequences, tiny_bert
from tests.helpers.kprune_models import CASES, FAMILIES, batches_for, tiny


def streams_of(family: str, task: str, each_sample: bool = False):
    model = tiny(family, task)
    encoder = LayerStack(model, find_architecture(model))

    def image_tokens(inputs):
        return encoder.enter(inputs)[0].shape[1]

    samples = collect_samples(model, batches_for(family), 10**6, image_tokens)
    keys = sample_keys(samples, 0)
    data = CalibrationData(samples, keys, max(keys), len(samples), sum(s.count for s in samples))
    memory = StateMemory(2**30, Path())
    predict = model_task(model).predict
    return start_streams(encoder, data, 2048, memory, predict, each_sample=each_sample)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
def test_a_classifier_reads_the_first_token(family: str) -> None:
    for stream in streams_of(family, "sequence"):
        assert stream.read[:, 0].all()
        assert not stream.read[:, 1:].any()


@pytest.mark.parametrize("task", ["tokens", "answers", "masked", "embeddings"])
def test_other_tasks_read_every_token(task: str) -> None:
    for stream in streams_of("bert", task):
        assert torch.equal(stream.read, stream.tokens)


@pytest.mark.parametrize("task", ["tokens", "embeddings"])
def test_the_weight_is_nothing_where_all_is_read(task: str) -> None:
    batches = batches_for("bert")
    found = [
        kprune(tiny("bert", task), batches, KPruneConfig(unread_weight=w), progress=False)
        for w in (1.0, 0.0)
    ]
    for name, value in found[0].state_dict().items():
        assert torch.equal(found[1].state_dict()[name], value), name


def test_which_tokens_are_read_is_looked_up_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = streams_of("bert", "sequence")
    monkeypatch.setattr("kprune_ext.samples.read_tokens.MOST_LOGITS", 1)
    for one, other in zip(whole, streams_of("bert", "sequence", each_sample=True), strict=True):
        assert torch.equal(one.read, other.read)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_two_samples_tell_what_a_task_reads(family: str, task: str) -> None:
    """The same as a look at every sample."""
    for one, other in zip(
        streams_of(family, task), streams_of(family, task, each_sample=True), strict=True
    ):
        assert torch.equal(one.read, other.read)


def test_the_head_runs_for_two_samples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = read_tokens.read_by_each
    monkeypatch.setattr(
        read_tokens, "read_by_each", lambda *args: seen.append(len(args[2])) or real(*args)
    )
    streams_of("bert", "sequence")
    assert seen == [1, 1]


def test_what_a_user_predicts_is_looked_up_for_every_sample() -> None:
    """Here the token that is read depends on the tokens themselves."""

    def predict(model, batch):
        hidden = model.bert(**batch).last_hidden_state
        place = batch["input_ids"].argmax(1)
        return model.classifier(hidden[torch.arange(len(hidden)), place])

    model, batches = tiny_bert(), padded(sequences())
    config = KPruneConfig(reduction=0.5, unread_weight=0.0)
    seen = []
    real = read_tokens.read_by_each

    def looked_up(stack, inputs, hidden, given):
        found = real(stack, inputs, hidden, given)
        assert torch.equal(found.int().argmax(1), inputs["input_ids"].argmax(1))
        seen.append(len(hidden))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kprune_ext.calibration.streams.read_by_each", looked_up)
        kprune(model, batches, config, predict=predict, progress=False)
    assert sum(seen) == len(sequences())


def test_nothing_is_looked_up_where_all_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kprune_ext.calibration.streams.read_by_each", lambda *_: pytest.fail("not needed")
    )
    kprune(tiny_bert(), padded(sequences()), KPruneConfig(unread_weight=1.0), progress=False)


def test_predictions_come_closer_on_the_calibration_data() -> None:
    model, batches = tiny_bert(neurons=200), padded(sequences(600))
    missed = []
    for weight in (1.0, 0.0):
        config = KPruneConfig(reduction=0.5, unread_weight=weight)
        pruned = kprune(model, batches, config, progress=False)
        with torch.no_grad():
            gaps = [pruned(**batch).logits - model(**batch).logits for batch in batches]
        missed.append(float(torch.cat(gaps).square().mean()))
    assert missed[1] < 0.8 * missed[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_unread_tokens_left_out(family: str) -> None:
    config = KPruneConfig(reduction=0.5, unread_weight=0.0)
    pruned = kprune(tiny(family), batches_for(family), config, progress=False)
    with torch.no_grad():
        assert pruned(**batches_for(family)[0]).logits.isfinite().all()


def test_a_weight_counts_tokens_so_many_times() -> None:
    features, targets = torch.randn(7, 5), torch.randn(7, 3)
    twice, double = NormalEquations.zeros(5, 3), NormalEquations.zeros(5, 3)
    twice.update(features, targets)
    twice.update(features, targets)
    double.update(features, targets, weight=2.0)
    for name in ("gram", "cross", "feature_sum", "target_sum"):
        torch.testing.assert_close(getattr(double, name), getattr(twice, name))
    assert double.target_square == pytest.approx(twice.target_square)
    assert double.tokens == twice.tokens == 14


def test_a_weight_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unread_weight=1.5 is outside \[0, 1\]"):
        KPruneConfig(unread_weight=1.5)
