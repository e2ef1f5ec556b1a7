"""Decoders with some of their key-value groups and neurons, with caches and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kprune_ext.architectures.table import ARCHITECTURES, find_architecture
from kprune_ext.modeling.classes import kept_units
from kprune_ext.modeling.copying import record_kept
from kprune_ext.units.sublayers import sublayers
from kprune_ext.units.surgery import shrink
from tests.helpers.kprune_decoders import (
    CUTS,
    DECODER_CASES,
    DECODERS,
    HIDDEN,
    cut,
    decoder_batches,
    equal_texts,
    masked,
    tiny_decoder,
)
from tests.helpers.kprune_models import outputs_of


def test_every_decoder_of_the_table_is_tested() -> None:
    rows = {row.model_type for row in ARCHITECTURES if row.is_causal}
    assert {kind for kind, _, _ in DECODERS.values()} == rows


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_those_of_the_dense_model_with_masks(family: str, name: str) -> None:
    model, batch = tiny_decoder(family), equal_texts()
    oracle = masked(model, family, CUTS[name])
    with torch.no_grad():
        expected = oracle(**batch).logits
        dense = model.double()(**batch).logits
        exact = cut(model, CUTS[name])(**batch).logits
        single = cut(model.float(), CUTS[name])(**batch).logits
    assert (expected - dense).abs().max() > 0.01 * dense.abs().max()
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-6)  # some parts are in float32
    torch.testing.assert_close(single.double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", DECODERS)
def test_both_implementations_of_attention_agree(family: str, attention: str) -> None:
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no sdpa attention with a soft cap")
    model = tiny_decoder(family, attn_implementation=attention)
    batch = equal_texts()
    for kept in CUTS.values():
        with torch.no_grad():
            found = cut(model, kept)(**batch).logits.double()
            expected = masked(model, family, kept)(**batch).logits
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("family", DECODERS)
def test_generation_gives_the_same_tokens_with_and_without_a_cache(family: str, name: str) -> None:
    """Left-padded prompts, longer than the sliding windows, in every kind of cache."""
    model, prompts = tiny_decoder(family), decoder_batches(4, longest=9)[0]
    pruned = cut(model, CUTS[name])
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    dense = masked(model, family, CUTS[name], torch.float32)
    expected = dense.generate(**prompts, **options, use_cache=False)
    assert len({tuple(row) for row in expected[:, -9:].tolist()}) > 1
    for more in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}):
        assert torch.equal(pruned.generate(**prompts, **options, **more), expected), more
    beams = options | {"num_beams": 3}
    one, other = (pruned.generate(**prompts, **beams, use_cache=use) for use in (True, False))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["some", "no heads first", "neither"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_text_in_two_parts_continues_in_the_cache(family: str, name: str) -> None:
    pruned = cut(tiny_decoder(family), CUTS[name])
    ids = torch.randint(3, 60, (2, 13))
    with torch.no_grad():
        whole = pruned(input_ids=ids).logits
        first = pruned(input_ids=ids[:, :6], use_cache=True)
        rest = pruned(input_ids=ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    assert first.past_key_values.get_seq_length() == 13
    found = torch.cat([first.logits, rest.logits], dim=1)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_the_cache_is_as_much_smaller_as_there_are_fewer_groups(family: str) -> None:
    model = tiny_decoder(family)
    dense, pruned = model, cut(model, [([1], [0])] * 3)
    ids = torch.randint(3, 60, (2, 4))
    sizes = []
    for each in (dense, pruned):
        with torch.no_grad():
            cache = each(input_ids=ids, use_cache=True).past_key_values
        sizes.append([layer.keys.numel() + layer.values.numel() for layer in cache.layers])
    assert [3 * size for size in sizes[1]] == sizes[0]


@pytest.mark.parametrize(("family", "task"), DECODER_CASES)
def test_every_task_runs_without_its_sub_layers(family: str, task: str) -> None:
    model, batch = tiny_decoder(family, task), equal_texts()
    for name in ("some", "neither"):
        pruned = cut(model, CUTS[name])
        expected = outputs_of(masked(model, family, CUTS[name]), batch)
        found = outputs_of(pruned, batch)
        assert [value.shape for value in found] == [value.shape for value in expected]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_pruned_twice_it_keeps_the_right_groups(family: str) -> None:
    model = tiny_decoder(family)
    first = [([0, 2], [0, 3, 4, 9, 19])] * 3
    twice = cut(model, first)
    second = [([1], [1, 4]), ([0], [0, 2, 3]), ([], [])]
    units = [part for layer in second for part in layer]
    for sublayer, part in zip(sublayers(twice, find_architecture(twice)), units, strict=True):
        shrink(sublayer, part)
    record_kept(twice, second)
    kept = [([2], [3, 19]), ([0], [0, 4, 9]), ([], [])]
    assert [(list(row.heads), list(row.neurons)) for row in kept_units(twice.config)] == kept
    batch = decoder_batches(4)[0]
    with torch.no_grad():
        assert torch.equal(twice(**batch).logits, cut(model, kept)(**batch).logits)


@pytest.mark.parametrize("family", DECODERS)
def test_training_reaches_every_weight_that_is_left(family: str) -> None:
    """As DistributedDataParallel needs; of attention without a group only the output's bias matters."""
    pruned = cut(tiny_decoder(family), CUTS["no heads first"]).train()
    batch = decoder_batches(4, side="right")[0]
    pruned(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in pruned.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("family", DECODERS)
def test_parameters_are_what_the_units_take(family: str) -> None:
    """Rows of queries, keys and values of a group, fused or not, biases, and columns of the output."""
    model = tiny_decoder(family)
    one, two = (
        sum(p.numel() for p in cut(model, [([0, 2][:n], [4, 7][:n])] + [([], [])] * 2).parameters())
        for n in (1, 2)
    )
    attention, ffn = sublayers(model, find_architecture(model))[:2]
    heads = attention.queries + 2
    bias = attention.inputs[0].bias is not None
    per_group = attention.head_size * (heads * (HIDDEN + bias) + attention.queries * HIDDEN)
    per_neuron = (ffn.projections - 1) * (HIDDEN + (ffn.inputs[0].bias is not None)) + HIDDEN
    assert two - one == per_group + per_neuron
