"""Fisher information of sequences from sampled next tokens, and knowledge of decoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from kprune_ext.architectures.table import find_architecture
from kprune_ext.calibration.state_memory import StateMemory
from kprune_ext.calibration.streams import start_streams
from kprune_ext.knowledge import next_token
from kprune_ext.knowledge.measure import measure_knowledge
from kprune_ext.knowledge.next_token import sampled_direction, uniform_draws
from kprune_ext.knowledge.signal import Signal
from kprune_ext.model_layers.layer_stack import LayerStack, plain_outputs
from kprune_ext.modeling.classes import model_task
from kprune_ext.samples.sharing import shared_data
from kprune_ext.units.sublayers import sublayers
from tests.helpers.kprune_decoders import decoder_batches, tiny_decoder


def started(model, batches, *, targets=True):
    data = shared_data(
        model, batches, max_tokens=10**6, seed=0, scored=(1.0, 1), causal=True, targets=targets
    )
    stack = LayerStack(model, find_architecture(model))
    with plain_outputs(model.config):
        return data, stack, start_streams(stack, data, 64, StateMemory(2**30, Path()))


def measured(model, batches, **options):
    """Knowledge of all units of a causal language model."""
    _, stack, streams = started(model, batches)
    signal = Signal(
        model_task(model).predict,
        "single_label_classification",
        **({"temperature": 1.0, "passes": 1, "next_tokens": True, "layerwise": True} | options),
    )
    targets = sublayers(model, find_architecture(model))
    with plain_outputs(model.config):
        return measure_knowledge(targets, stack, streams, signal)


def test_directions_have_the_mean_and_covariance_of_the_fisher_information() -> None:
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64)
    draws = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for temperature in (1.0, 2.0):
        found = sampled_direction(logits.expand(len(draws), 4), draws, temperature)
        p = (logits / temperature).softmax(0)
        torch.testing.assert_close(found.mean(0), torch.zeros_like(p), atol=1e-4, rtol=0)
        covariance = found.T @ found / len(draws)
        torch.testing.assert_close(covariance, p.diag() - p.outer(p), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_draw_is_a_token(dtype: torch.dtype) -> None:
    logits = torch.full((1, 3), -1e4, dtype=dtype)
    logits[0, 1] = 0
    for draw in (0.0, 1 - 2**-53):
        found = sampled_direction(logits, torch.tensor([draw], dtype=torch.float64))
        assert found.tolist() == [[0.0, 0.0, 0.0]]  # certain: nothing can change


def test_draws_depend_on_the_sample_alone() -> None:
    both, one = uniform_draws([5, 9], 2, 7), uniform_draws([9], 2, 7)
    assert both.shape == (2, 2, 7) and torch.equal(both[:, 1:], one)
    assert not torch.equal(both[:, 0], both[:, 1]) and not torch.equal(both[0], both[1])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("draws", [1, 3])
def test_predictive_knowledge_is_the_squared_gradient_of_each_sequence(family, draws) -> None:
    model = tiny_decoder(family, dtype=torch.float64).requires_grad_(False)
    batches = decoder_batches(6)
    data, _, _ = started(model, batches)
    found = measured(model, batches, passes=draws)
    targets = sublayers(model, find_architecture(model))
    expected = [torch.zeros(target.units, dtype=torch.float64) for target in targets]
    for key, sample in zip(data.keys, data.samples, strict=True):
        masks = [torch.ones(t.units, dtype=torch.float64, requires_grad=True) for t in targets]
        handles = [
            target.output.register_forward_pre_hook(
                lambda _, args, m=mask, t=target: (args[0] * m.repeat_interleave(t.unit_size),)
            )
            for mask, target in zip(masks, targets, strict=True)
        ]
        logits = model(sample.inputs["input_ids"], use_cache=False).logits[0, :-1]
        uniform = uniform_draws([key], draws, sample.tokens.shape[1])[:, 0, :-1]
        for draw in uniform:
            cumulative = logits.detach().softmax(1).cumsum(1)
            tokens = (cumulative <= draw.unsqueeze(1) * cumulative[:, -1:]).sum(1)
            total = log_softmax(logits, 1).gather(1, tokens.unsqueeze(1)).sum()
            gradients = torch.autograd.grad(total, masks, retain_graph=True)
            for part, gradient in zip(expected, gradients, strict=True):
                part += 0.5 * gradient.square() / draws / len(data.samples)
        for handle in handles:
            handle.remove()
    for known, part in zip(found, expected, strict=True):
        torch.testing.assert_close(known.predictive, part, rtol=1e-5, atol=1e-8)


def test_logits_are_formed_for_a_few_positions_at_a_time(monkeypatch) -> None:
    model, batches = tiny_decoder("llama"), decoder_batches(8)
    whole = measured(model, batches)
    sizes = []
    real = next_token.logits_in_chunks

    def small(stack, inputs, hidden, counted):
        for chunk, logits in real(stack, inputs, hidden, counted, most=300):
            sizes.append(logits.numel())
            yield chunk, logits

    monkeypatch.setattr(next_token, "logits_in_chunks", small)
    parts = measured(model, batches)
    assert len(sizes) > len(batches) and max(sizes) <= 5 * 60  # a batch of 64 tokens, 60 classes
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.predictive, other.predictive, rtol=1e-5, atol=0)


def test_only_answers_count_for_predictions() -> None:
    model, batches = tiny_decoder("llama"), decoder_batches(8)
    whole = measured(model, batches)
    nothing = [b | {"labels": torch.full_like(b["input_ids"], -100)} for b in batches]
    answers = []
    for batch in batches:  # the last two tokens
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -2:] = batch["input_ids"][:, -2:]
        answers.append(batch | {"labels": labels})
    some, none = measured(model, answers), measured(model, nothing)
    for one, two, three in zip(whole, some, none, strict=True):
        assert three.predictive.abs().sum() == 0
        assert not torch.allclose(one.predictive, two.predictive, rtol=0.05)
        torch.testing.assert_close(one.representational, two.representational)


@pytest.mark.parametrize("task", ["sequence", "tokens", "embeddings"])
def test_layer_by_layer_is_the_same_as_at_once(task: str) -> None:
    model = tiny_decoder("llama", task, dtype=torch.float64).requires_grad_(False)
    batches = [
        {"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]}
        for b in decoder_batches(8)
    ]
    _, stack, streams = started(model, batches, targets=False)
    targets = sublayers(model, find_architecture(model))
    found = []
    for layerwise in (False, True):
        problem = "regression" if task == "embeddings" else "single_label_classification"
        signal = Signal(model_task(model).predict, problem, 2.0, 8, layerwise=layerwise)
        with plain_outputs(model.config):
            found.append(
                measure_knowledge(targets[2:], stack, advanced(stack, streams, targets[:2]), signal)
            )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.predictive, other.predictive, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(one.representational, other.representational)
        assert one.predictive.sum() > 0


@torch.no_grad()
def advanced(stack, streams, below):
    """The streams before a higher sub-layer."""
    found = [stream.part(slice(None)) for stream in streams]
    for stream in found:
        hidden, contexts = stack.enter(stream.inputs)
        for sublayer in below:
            hidden = sublayer.run(hidden, contexts[sublayer.layer])
        stream.student.copy_(hidden)
    return found


def test_representational_knowledge_is_relative_to_the_residual_stream() -> None:
    model = tiny_decoder("llama", dtype=torch.float64).requires_grad_(False)
    batches = decoder_batches(6, side="right")
    found = measured(model, batches, relative=True)
    target = sublayers(model, find_architecture(model))[3]  # neurons of layer 1
    features, outputs = [], []
    handles = [
        target.output.register_forward_pre_hook(lambda _, args: features.append(args[0])),
        target.module.register_forward_hook(lambda _, __, output: outputs.append(output)),
    ]
    mean, count = 0.0, 0
    for batch in batches:
        features.clear(), outputs.clear()
        model(**batch, use_cache=False)
        counted = batch["attention_mask"].double()
        scaled = features[0].square() / outputs[0].square().mean(2, keepdim=True)
        mean = mean + (scaled * counted.unsqueeze(2)).sum((0, 1))
        count += int(counted.sum())
    for handle in handles:
        handle.remove()
    expected = mean / count * target.weight.square().mean(0)
    torch.testing.assert_close(found[3].representational, expected)


def test_a_residual_stream_that_grows_does_not_empty_the_early_layers() -> None:
    model, batches = tiny_decoder("llama"), decoder_batches(8)
    grown = tiny_decoder("llama")
    with torch.no_grad():  # the last layer writes a hundred times as much
        grown.model.layers[-1].mlp.down_proj.weight.mul_(100)
        grown.model.layers[-1].self_attn.o_proj.weight.mul_(100)

    def share(which, relative):
        known = measured(which, batches, relative=relative)
        first = float(known[0].representational.sum() + known[1].representational.sum())
        return first / sum(float(part.representational.sum()) for part in known)

    assert share(grown, False) < 0.01 * share(model, False)
    assert share(grown, True) > 0.5 * share(model, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype: torch.dtype) -> None:
    batches = decoder_batches(8)
    exact = measured(tiny_decoder("llama"), batches)
    rough = measured(tiny_decoder("llama", dtype=dtype), batches)
    for one, other in zip(exact, rough, strict=True):
        assert other.predictive.dtype == torch.float64
        ratio = other.representational.sum() / one.representational.sum()
        assert 0.9 < ratio < 1.1
