"""Calibration data of causal language models: padding, labels, held-out samples and their loss."""

from __future__ import annotations

import pytest
import torch

from kprune_ext.architectures.table import find_architecture
from kprune_ext.calibration.next_tokens import counted_positions, logits_in_chunks, token_loss
from kprune_ext.model_layers.layer_stack import LayerStack, plain_outputs
from kprune_ext.samples.choice import least_held_out
from kprune_ext.samples.samples import collect_samples
from kprune_ext.samples.sharing import shared_data
from kprune_ext.units.sublayers import sublayers
from tests.helpers.kprune_decoders import DECODERS, decoder_batches, tiny_decoder


def samples_of(batches, **options):
    options = {"causal": True, "targets": True} | options
    return collect_samples(tiny_decoder("llama"), batches, 10**6, **options)


def test_samples_are_the_same_whichever_side_is_padded() -> None:
    left, right = (samples_of(decoder_batches(12, side=side)) for side in ("left", "right"))
    assert len(left) == len(right) == 12
    for one, other in zip(left, right, strict=True):
        assert one.inputs.keys() == other.inputs.keys()
        for name in one.inputs:
            assert torch.equal(one.inputs[name], other.inputs[name])
        assert one.tokens.all() and torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.targets, one.inputs["input_ids"])


def test_padding_before_a_sequence_stays_in_encoders() -> None:
    kept = samples_of(decoder_batches(12, side="left"), causal=False, targets=False)
    assert any(not sample.tokens.all() for sample in kept)
    assert all(sample.targets is None for sample in kept)


def test_labels_mark_the_answers() -> None:
    batch = decoder_batches(4, side="left", batch=4)[0]
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
    for sample in samples_of([batch | {"labels": labels}]):
        assert (sample.targets[0] != -100).tolist()[-3:] == [True] * 3
        counted = counted_positions(sample.targets)[0]
        last = [
            len(counted) - 4 + n for n in range(3)
        ]  # the first token of a text has none before it
        assert counted.nonzero().flatten().tolist() == [n for n in last if n >= 0]
    padded = labels.clone()
    padded[batch["attention_mask"] == 0] = 7  # labels of padding do not count either
    for one, other in zip(
        samples_of([batch | {"labels": labels}]),
        samples_of([batch | {"labels": padded}]),
        strict=True,
    ):
        assert torch.equal(one.targets, other.targets)


def test_wrong_labels() -> None:
    batch = decoder_batches(4, batch=4)[0]
    for labels in (torch.zeros(4, dtype=torch.long), batch["input_ids"].float()):
        with pytest.raises(ValueError, match="one token number per token"):
            samples_of([batch | {"labels": labels}])


def test_embedded_inputs_need_labels() -> None:
    model = tiny_decoder("llama")
    batch = decoder_batches(4, batch=4)[0]
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach(),
        "attention_mask": batch["attention_mask"],
    }
    with pytest.raises(ValueError, match="needs 'labels'"):
        samples_of([embedded])
    found = samples_of([embedded | {"labels": batch["input_ids"]}])
    for one, other in zip(found, samples_of([batch]), strict=True):
        assert torch.equal(one.targets, other.targets)


def test_held_out_samples_are_left_out_of_everything_else() -> None:
    model, batches = tiny_decoder("llama"), decoder_batches(40)
    options = {"max_tokens": 10**6, "seed": 0, "scored": (0.5, 1), "causal": True, "targets": True}
    data = shared_data(model, batches, **options, held_out=0.1)
    assert (len(data.samples), len(data.held_out), data.count) == (36, 4, 36)
    assert data.tokens == sum(sample.count for sample in data.samples)
    assert sum(key <= data.largest_scored for key in data.keys) == 18
    turned = shared_data(model, decoder_batches(40)[::-1], **options, held_out=0.1)

    def texts(samples):
        return sorted(tuple(s.inputs["input_ids"][0].tolist()) for s in samples)

    assert texts(data.held_out) == texts(turned.held_out)
    assert shared_data(model, batches, **options).held_out == []


def test_few_samples_are_not_held_out() -> None:
    assert least_held_out([5, 3, 9], 0.05) == 10
    assert least_held_out(list(range(10)), 0.05) == 9
    assert least_held_out(list(range(10)), 0.0) == 10
    assert least_held_out(list(range(4)), 0.5) == 2
    assert least_held_out([], 0.5) == 0


@pytest.mark.parametrize("family", DECODERS)
def test_the_loss_is_that_of_the_model(family: str) -> None:
    model, batches = tiny_decoder(family), decoder_batches(10)
    samples = samples_of(batches)
    stack, targets = (
        LayerStack(model, find_architecture(model)),
        sublayers(model, find_architecture(model)),
    )
    with plain_outputs(model.config):
        found = token_loss(stack, targets, samples, 30)
    expected = 0.0
    for sample in samples:
        ids = sample.inputs["input_ids"]
        with torch.no_grad():
            expected += float(model(ids, labels=ids, use_cache=False).loss) * (ids.shape[1] - 1)
    assert found.count == len(found.chosen) == sum(sample.count - 1 for sample in samples)
    assert found.total == pytest.approx(expected, rel=1e-4)


def test_chunks_have_at_most_so_many_logits() -> None:
    model = tiny_decoder("gemma2").requires_grad_(False)
    ids = torch.randint(3, 60, (2, 9))
    stack = LayerStack(model, find_architecture(model))
    seen = []
    with torch.no_grad(), plain_outputs(model.config):
        hidden = torch.randn(2, 9, model.config.hidden_size)
        counted = torch.ones(2, 9, dtype=torch.bool)
        counted[:, 4] = False
        for chunk, logits in logits_in_chunks(stack, {"input_ids": ids}, hidden, counted, 400):
            assert logits.shape == (2, len(chunk), 60) and logits.numel() <= 400
            seen += chunk.tolist()
    assert seen == [0, 1, 2, 3, 5, 6, 7, 8]


def test_no_cache_reaches_the_layers() -> None:
    model = tiny_decoder("llama")
    assert model.config.use_cache
    stack = LayerStack(model, find_architecture(model))
    with plain_outputs(model.config):
        _, contexts = stack.enter({"input_ids": torch.randint(3, 60, (2, 9))})
    assert model.config.use_cache
    assert all({"past_key_values", "cache"}.isdisjoint(context) for context in contexts)
    assert not any(context.get("use_cache") for context in contexts)
