"""The engine: memory, budgets of every kind, ill-conditioned units, and the paper's way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kprune_ext import KPruneConfig, LatencyTable, kprune, measure_latency
from kprune_ext.architectures.table import find_architecture
from kprune_ext.calibration.state_memory import StateMemory
from kprune_ext.calibration.streams import start_streams
from kprune_ext.knowledge.measure import measure_knowledge, teacher_logits
from kprune_ext.knowledge.passes import in_parts
from kprune_ext.knowledge.signal import Signal
from kprune_ext.model_layers.layer_stack import LayerStack
from kprune_ext.modeling.classes import model_task
from kprune_ext.units.sublayers import sublayers
from tests.helpers.kprune import data_of, padded, run, sequences, tiny_bert
from tests.helpers.kprune_models import batches_for, outputs_of, tiny
from tests.reference import kprune_oracle as oracle


def test_hidden_states_in_a_file_give_the_same_model(monkeypatch) -> None:
    memories: list[StateMemory] = []

    class Noted(StateMemory):
        def __init__(self, limit: int, folder: Path) -> None:
            super().__init__(limit, folder)
            memories.append(self)

    monkeypatch.setattr("kprune_ext.calibration.state_memory.StateMemory", Noted)
    model, samples = tiny_bert(), sequences(40)
    held = run(model, padded(samples))
    spilled = run(model, padded(samples), max_state_memory=1000)
    tokens = sum(map(len, samples))
    size = 2 * 4 * 24 * tokens  # two models, four bytes
    assert (memories[0].used, memories[0].spilled) == (size, 0)
    assert memories[1].used <= 1000 and memories[1].used + memories[1].spilled == size
    assert not list(memories[1]._folder.parent.glob(memories[1]._folder.name))
    batch = padded(samples)[0]
    assert torch.equal(outputs_of(held, batch)[0], outputs_of(spilled, batch)[0])


@pytest.mark.parametrize("family", ["bert", "modernbert", "dinov2"])
def test_parameters_meet_their_budget(family: str) -> None:
    model = tiny(family, neurons=600)
    pruned = run(model, batches_for(family), reduction=0.6, metric="params")
    report = pruned.kprune_report
    removed = model.num_parameters() - pruned.num_parameters()
    assert report.cost_before - report.cost == removed
    assert 0.995 * 0.4 <= report.cost / report.cost_before <= 0.4
    share = report.cost / report.cost_before
    assert f"parameters of heads and neurons: {share:.1%} kept, budget 40.0%" in str(report)


def latencies(heads: dict[int, float], neurons: dict[int, float]) -> LatencyTable:
    return LatencyTable("test", 32, 64, heads, neurons)


def test_latency_meets_its_budget() -> None:
    table = latencies({0: 1.0, 2: 3.0, 4: 4.0}, {0: 2.0, 20: 2.0, 40: 10.0})
    config = KPruneConfig(reduction=0.4, metric="latency")
    model, batches = tiny_bert(), padded(sequences())
    report = kprune(model, batches, config, latency=table, progress=False).kprune_report
    seconds = sum(
        float(table.costs(row.kind, row.units_before)[row.units]) for row in report.sublayers
    )
    assert report.cost == pytest.approx(1e9 * seconds)
    assert report.cost_before == pytest.approx(1e9 * 28)
    assert 0.9 * 0.6 * 28 < seconds <= 0.6 * 28
    with pytest.raises(ValueError, match="parts that cannot be removed"):
        far = KPruneConfig(reduction=0.9, metric="latency")
        kprune(model, batches, far, latency=table, progress=False)


def test_latency_tables_are_measured_and_kept(tmp_path) -> None:
    model = tiny_bert(neurons=64)
    table = measure_latency(model, batch_size=2, sequence_length=8, rounds=2)
    assert list(table.heads) == [0, 1, 2, 3, 4]
    assert list(table.neurons) == [0, 8, 16, 24, 32, 40, 48, 56, 64]
    assert all(seconds > 0 for seconds in (*table.heads.values(), *table.neurons.values()))
    table.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == table
    with pytest.raises(ValueError, match="no entries from 0 to 65 units"):
        table.costs("ffn", 65)
    (tmp_path / "other.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="is not a latency table"):
        LatencyTable.load(tmp_path / "other.json")
    pruned = run(model, padded(sequences()), metric="latency", reduction=0.3)
    assert pruned.kprune_report.cost <= 0.7 * pruned.kprune_report.cost_before
    most = max(row.units for row in pruned.kprune_report.sublayers if row.kind == "ffn")
    assert max(measure_latency(pruned, 2, 8, rounds=1).neurons) == most


@pytest.mark.parametrize("damage", ["copies", "dead"])
@pytest.mark.parametrize("ridge", [1.0, 0.0])
def test_copied_and_dead_units_do_no_harm(damage: str, ridge: float) -> None:
    """Neurons that are copies of one another, or always zero, make the equations singular."""
    model, samples = tiny_bert(neurons=64), sequences(100)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            for linear in (layer.intermediate.dense, layer.attention.self.value):
                half = len(linear.weight) // 2
                if damage == "copies":
                    linear.weight[half:], linear.bias[half:] = (
                        linear.weight[:half],
                        linear.bias[:half],
                    )
                else:
                    linear.weight[half:], linear.bias[half:] = 0, -100.0 * (half == 32)
    pruned = run(model, padded(samples), reduction=0.3, ridge=ridge, score_fraction=1.0)
    held_out = padded(sequences(20, seed=5))
    distance = reference = 0.0
    for batch in held_out:
        dense = outputs_of(model, batch)[0]
        distance += float((outputs_of(pruned, batch)[0] - dense).square().sum())
        reference += float(dense.var(0).sum() * len(dense))
    assert distance < 0.5 * reference
    largest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    for row in pruned.kprune_report.sublayers:
        assert float(pruned.get_submodule(row.name).weight.detach().abs().max()) < 10 * largest


def test_paper_config() -> None:
    config = KPruneConfig.paper(reduction=0.8, seed=3)
    assert (config.temperature, config.lambda_rep, config.mu) == (2.0, 2.5e-4, 64.0)
    assert config.schedule == "per_sublayer" and config.score_fraction == 1.0
    assert config.sensitivity == "gradient" and config.ridge == 0 and not config.tune_bias
    assert not config.scale_logits
    assert (config.reduction, config.seed) == (0.8, 3)


def test_paper_mode_squares_the_gradient_of_the_divergence() -> None:
    """Against autograd on one sample at a time, with a student that differs from the teacher."""
    model, samples = tiny_bert(dtype=torch.float64), sequences(6)
    student = tiny_bert(dtype=torch.float64)
    with torch.no_grad():
        student.bert.encoder.layer[0].output.dense.weight.mul_(0.8)
    config = KPruneConfig.paper().meant_for(is_causal=False, next_tokens=False)
    naive, teacher = oracle.NaiveBert.of(student), oracle.NaiveBert.of(model)
    expected = {key: torch.zeros_like(mask) for key, mask in naive.masks.items()}
    for ids in samples:
        masks = {key: mask.clone().requires_grad_() for key, mask in naive.masks.items()}
        loss = oracle.divergence(teacher, naive, [ids], config.temperature, masks)
        for key, gradient in zip(
            masks, torch.autograd.grad(loss, list(masks.values())), strict=True
        ):
            expected[key] += 0.5 * gradient**2 / len(samples)

    architecture, predict = find_architecture(model), model_task(model).predict
    data = data_of(model, padded(samples), config)
    streams = start_streams(
        LayerStack(model, architecture), data, config.batch_tokens, StateMemory(2**30, Path())
    )
    dense = teacher_logits(
        sublayers(model, architecture), LayerStack(model, architecture), predict, streams
    )
    signal = Signal(predict, "single_label_classification", config.temperature, 8, teacher=dense)
    found = measure_knowledge(
        sublayers(student, architecture), LayerStack(student, architecture), streams, signal
    )
    for key, known in zip(naive.keys(), found, strict=True):
        assert expected[key].max() > 0
        torch.testing.assert_close(known.predictive, expected[key], rtol=1e-8, atol=1e-14)


def test_paper_mode_keeps_biases_and_fits_weights_exactly() -> None:
    model, samples = tiny_bert(neurons=64, dtype=torch.float64), sequences(60)
    pruned = kprune(model, padded(samples), KPruneConfig.paper(0.5), progress=False)
    report = pruned.kprune_report
    assert report.flops <= 0.5 * report.flops_before
    changed = 0
    for row in report.sublayers:
        before, after = model.get_submodule(row.name), pruned.get_submodule(row.name)
        assert torch.equal(before.bias, after.bias)
        if 0 < row.units < row.units_before:
            changed += 1
            assert row.error < 1
    assert changed


def test_paper_mode_with_fewer_tokens_than_units() -> None:
    """Nothing but rounding makes the least squares definite then."""
    model, samples = tiny_bert(neurons=256, hidden=32), sequences(6)
    pruned = kprune(model, padded(samples), KPruneConfig.paper(0.3), progress=False)
    for row in pruned.kprune_report.sublayers:
        before, after = model.get_submodule(row.name), pruned.get_submodule(row.name)
        assert row.error < 1
        assert after.weight.norm() < 3 * before.weight.norm()


@pytest.mark.parametrize("depth", [4, 40])
def test_what_goes_backward_at_a_time_does_not_grow_with_depth(depth: int) -> None:
    model = tiny_bert(layers=2)
    encoder = LayerStack(model, find_architecture(model))
    config = KPruneConfig().meant_for(is_causal=False, next_tokens=False)
    data = data_of(model, [{"input_ids": torch.arange(5, 35).unsqueeze(1).expand(30, 9)}])
    streams = start_streams(encoder, data, config.batch_tokens, StateMemory(2**30, Path()))
    predict = model_task(model).predict
    signal = Signal(predict, "single_label_classification", 2.0, 8, depth_tokens=1000)
    parts = list(in_parts(streams, depth, encoder, signal))
    assert sorted(key for part in parts for key in part.keys) == sorted(data.keys)
    for part in parts:
        assert part.tokens.numel() * depth <= 1000
        assert len(part.student) == len(part.keys) == len(part.inputs["input_ids"])
    assert max(len(part.keys) for part in parts) == 1000 // (9 * depth)
