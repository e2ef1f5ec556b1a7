"""Every step of K-prune against the naive oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kprune_ext import KPruneConfig, kprune
from kprune_ext.architectures.table import find_architecture
from kprune_ext.budget.flops import head_flops, neuron_flops
from kprune_ext.budget.search import search_masks
from kprune_ext.calibration.state_memory import StateMemory
from kprune_ext.calibration.streams import start_streams
from kprune_ext.knowledge.measure import Knowledge, measure_knowledge
from kprune_ext.knowledge.signal import Signal
from kprune_ext.model_layers.layer_stack import LayerStack
from kprune_ext.modeling.classes import model_task
from kprune_ext.tuning.least_squares import NormalEquations, tune_projection
from kprune_ext.units.sublayers import sublayers
from tests.helpers.kprune import data_of, padded, sequences, tiny_bert
from tests.reference import kprune_oracle as oracle

TEMPERATURE = 2.0


def knowledge_of(model: torch.nn.Module, samples: list[torch.Tensor]) -> list[Knowledge]:
    architecture = find_architecture(model)
    config = KPruneConfig(score_fraction=1.0)
    config = config.meant_for(is_causal=False, next_tokens=False)
    encoder = LayerStack(model, architecture)
    data = data_of(model, padded(samples), config)
    streams = start_streams(encoder, data, config.batch_tokens, StateMemory(2**30, Path()))
    predict = model_task(model).predict
    signal = Signal(predict, "single_label_classification", TEMPERATURE, passes=16)
    return measure_knowledge(sublayers(model, architecture), encoder, streams, signal)


def test_oracle_runs_bert_as_transformers_does() -> None:
    model, samples = tiny_bert(dtype=torch.float64), sequences(3)
    naive = oracle.NaiveBert.of(model)
    for ids in samples:
        expected = model(input_ids=ids.unsqueeze(0)).logits[0]
        torch.testing.assert_close(naive.logits(ids), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("labels", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_predictive_knowledge(labels: int, dtype: torch.dtype, tolerance: float) -> None:
    model, samples = tiny_bert(labels=labels, dtype=dtype), sequences()
    naive = oracle.NaiveBert.of(model)
    expected = oracle.predictive_knowledge(naive, samples, TEMPERATURE)
    found = knowledge_of(model, samples)
    for key, known in zip(naive.keys(), found, strict=True):
        assert expected[key].max() > 1e-4  # not a comparison of zeros, at the first sub-layer too
        torch.testing.assert_close(
            known.predictive, expected[key], rtol=tolerance, atol=tolerance * 1e-2
        )


def test_predictive_knowledge_is_the_curvature_of_the_divergence() -> None:
    model, samples = tiny_bert(layers=1, dtype=torch.float64), sequences(6)
    naive = oracle.NaiveBert.of(model)
    found = knowledge_of(model, samples)
    for key, known in zip(naive.keys(), found, strict=True):
        mask = naive.masks[key].clone()
        hessian = torch.autograd.functional.hessian(
            lambda m, key=key: oracle.divergence(
                naive, naive, samples, TEMPERATURE, naive.masks | {key: m}
            ),
            mask,
        )
        torch.testing.assert_close(
            known.predictive, 0.5 * hessian.diagonal(), rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_representational_knowledge(dtype: torch.dtype, tolerance: float) -> None:
    model, samples = tiny_bert(dtype=dtype), sequences()
    naive = oracle.NaiveBert.of(model)
    expected = oracle.representational_knowledge(naive, samples)
    for key, known in zip(naive.keys(), knowledge_of(model, samples), strict=True):
        torch.testing.assert_close(known.representational, expected[key], rtol=tolerance, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.2, 0.5, 0.8, 1.0])
def test_mask_search(share: float) -> None:
    scores = [torch.rand(size) for size in (12, 150, 12, 150)]
    costs = [7_000, 100, 7_000, 100]
    total = sum(len(score) * cost for score, cost in zip(scores, costs, strict=True))
    expected = oracle.best_threshold_masks(scores, costs, share * total)
    found = search_masks(scores, costs, int(share * total))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("tokens", [5, 40, 4000])
def test_weight_tuning(tokens: int) -> None:
    units, outputs = 20, 7
    features = torch.randn(tokens, units).double() * torch.rand(units).double() + 0.3
    targets, weight = torch.randn(tokens, outputs).double(), torch.randn(outputs, units).double()
    equations = NormalEquations.zeros(units, outputs)
    for part in range(0, tokens, 16):
        equations.update(features[part : part + 16], targets[part : part + 16])
    fit = tune_projection(equations, weight, ridge=0.7)
    expected_weight, expected_bias = oracle.tuned_weights(features, targets, weight, 0.7)
    torch.testing.assert_close(fit.weight, expected_weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.bias, expected_bias, rtol=1e-9, atol=1e-9)
    missed = targets - features @ expected_weight.T - expected_bias
    variation = targets - targets.mean(0)
    assert fit.error == pytest.approx(float(missed.norm() / variation.norm()), rel=1e-7)


@pytest.mark.parametrize("reduction", [0.4, 0.75])
def test_whole_algorithm(reduction: float) -> None:
    model, samples = tiny_bert(dtype=torch.float64), sequences(32)
    length = round(sum(map(len, samples)) / len(samples))
    config = KPruneConfig(
        reduction=reduction,
        temperature=TEMPERATURE,
        lambda_rep=1e-2,
        lambda_scale="absolute",
        prior_samples=0.0,
        min_share=0.0,
        schedule="per_sublayer",
        score_fraction=1.0,
        ridge=0.5,
        unread_weight=1.0,
        scale_logits=False,
    )
    expected = oracle.prune(
        model,
        samples,
        reduction=reduction,
        temperature=TEMPERATURE,
        lambda_rep=1e-2,
        ridge=0.5,
        flops={"attention": head_flops(24, 6, length), "ffn": neuron_flops(24, length)},
    )
    pruned = kprune(model, padded(samples), config, progress=False)
    kept = [
        tuple(row[kind] for kind in ("num_heads", "num_neurons"))
        for row in pruned.config.kprune["layers"]
    ]
    assert kept == [
        (int(expected.masks[layer, "attention"].sum()), int(expected.masks[layer, "ffn"].sum()))
        for layer in range(2)
    ]
    for ids in samples:
        logits = pruned(input_ids=ids.unsqueeze(0)).logits[0]
        torch.testing.assert_close(logits, expected.logits(ids), rtol=1e-6, atol=1e-6)
