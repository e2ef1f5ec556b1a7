"""kprune(): what it makes of a model, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

from kprune_ext import KPruneReport, kprune
from tests.helpers.kprune import assert_same_state, padded, run, sequences, state_of, tiny_bert

# A small ridge, weak scores and few samples would hide differences: all samples are scored.
ALL = {"score_fraction": 1.0}


def logits_of(model: torch.nn.Module, samples: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=ids.unsqueeze(0)).logits for ids in samples])


def test_matrices_are_really_smaller() -> None:
    model = tiny_bert(neurons=200)
    pruned = run(model, padded(sequences()), reduction=0.5)
    rows = pruned.config.kprune["layers"]
    for row, layer in zip(rows, pruned.bert.encoder.layer, strict=True):
        dims = row["num_heads"] * 6
        for name in ("query", "key", "value"):
            assert getattr(layer.attention.self, name).weight.shape == (dims, 24)
        assert layer.attention.output.dense.weight.shape == (24, dims)
        assert layer.intermediate.dense.weight.shape == (row["num_neurons"], 24)
        assert layer.output.dense.weight.shape == (24, row["num_neurons"])
    assert sum(row["num_heads"] for row in rows) < 8 or sum(r["num_neurons"] for r in rows) < 400
    assert pruned.num_parameters() < model.num_parameters()
    assert not pruned.training


@pytest.mark.parametrize("reduction", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_flops_meet_the_budget_and_the_flop_counter(reduction: float) -> None:
    model = tiny_bert(neurons=1200, attention="eager")
    pruned = run(model, padded(sequences()), reduction=reduction, sequence_length=9)
    report = pruned.kprune_report

    def counted(encoder: torch.nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(torch.randn(1, 9, 24))
        return counter.get_total_flops()

    assert report.flops_before == counted(model.bert.encoder)
    assert report.flops == counted(pruned.bert.encoder)
    budget = (1 - reduction) * report.flops_before
    assert 0.99 * budget <= report.flops <= budget


def test_weights_of_kept_units_come_from_the_original() -> None:
    model = tiny_bert()
    pruned = run(model, padded(sequences()), reduction=0.6)
    for number, row in enumerate(pruned.config.kprune["layers"]):
        kept = [
            index
            for run_ in filter(None, row["neurons"].split(","))
            for first, _, last in [run_.partition("-")]
            for index in range(int(first), int(last or first) + 1)
        ]
        before, after = model.bert.encoder.layer[number], pruned.bert.encoder.layer[number]
        assert torch.equal(after.intermediate.dense.weight, before.intermediate.dense.weight[kept])
        assert torch.equal(after.intermediate.dense.bias, before.intermediate.dense.bias[kept])


def test_tuning_brings_the_output_closer_than_cutting_alone() -> None:
    model, samples = tiny_bert(), sequences(200)
    pruned = run(model, padded(samples), reduction=0.4, **ALL)
    cut = run(model, padded(samples), reduction=0.4, ridge=1e12, **ALL)
    # Such a ridge leaves the weights; the bias is still tuned.
    held_out = sequences(50, seed=9)
    teacher = logits_of(model, held_out)
    error = (logits_of(pruned, held_out) - teacher).norm()
    assert error < 0.8 * (logits_of(cut, held_out) - teacher).norm()


def marked(model: Any) -> Any:
    """A model with everything that pruning might disturb."""
    model.train()
    model.bert.pooler.eval()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: None)
    batch = padded(sequences(4))[0]
    model(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    return model


def test_the_original_is_untouched() -> None:
    model = marked(tiny_bert(output_hidden_states=True, output_attentions=True, attention="eager"))
    before = state_of(model)
    pruned = run(model, padded(sequences()))
    assert_same_state(before, state_of(model))
    assert not pruned.bert.embeddings.word_embeddings.weight.requires_grad
    assert pruned.classifier.weight.requires_grad
    assert pruned.bert.encoder.layer[0].output.dense.weight.requires_grad
    assert all(parameter.grad is None for parameter in pruned.parameters())


def test_the_original_is_untouched_after_an_error() -> None:
    model = marked(tiny_bert())
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.bias[3] = float("nan")
    before = state_of(model)
    with pytest.raises(ValueError, match="NaN"):
        run(model, padded(sequences()))
    after = state_of(model)
    for state in (before, after):
        state["weights"].pop("bert.encoder.layer.1.intermediate.dense.bias")
        state["gradients"].pop("bert.encoder.layer.1.intermediate.dense.bias")
    assert_same_state(before, after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batch_size_and_padding_do_not_matter(dtype: torch.dtype) -> None:
    model, samples = tiny_bert(dtype=dtype), sequences(40)
    plain = run(model, padded(samples, 1), **ALL)
    other = run(model, padded(samples, 13, extra=7), batch_tokens=50, **ALL)
    assert plain.config.kprune == other.config.kprune
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(
        logits_of(plain, samples), logits_of(other, samples), rtol=tolerance, atol=tolerance
    )


def test_padding_inside_a_sequence_counts_for_nothing() -> None:
    model, samples = tiny_bert(dtype=torch.float64), sequences(20)
    batches = padded(samples)
    for batch in batches:
        batch["attention_mask"][:, 1] = 0  # a hole that cannot be cut off
    plain = run(model, batches, **ALL)
    for batch in batches:
        batch["input_ids"][:, 1] = 59
    other = run(model, batches, **ALL)
    assert plain.config.kprune == other.config.kprune
    torch.testing.assert_close(logits_of(plain, samples), logits_of(other, samples))
    assert plain.kprune_report.tokens == sum(map(len, samples)) - len(samples)


def test_labels_and_unknown_columns_are_ignored() -> None:
    model, samples = tiny_bert(), sequences()
    batches = padded(samples)
    extended = [
        batch | {"labels": torch.randn(len(batch["input_ids"])), "text": ["a", "b"], "idx": None}
        for batch in batches
    ]
    plain, labelled = run(model, batches), run(model, extended)
    assert torch.equal(logits_of(plain, samples), logits_of(labelled, samples))


def test_the_seed_decides_and_global_random_state_does_not() -> None:
    model, samples = tiny_bert(), sequences(60)
    torch.manual_seed(3)
    one = run(model, padded(samples), seed=1, min_score_samples=1)
    state = torch.get_rng_state()
    two = run(model, padded(samples), seed=1, min_score_samples=1)
    assert torch.equal(state, torch.get_rng_state())
    other = run(model, padded(samples), seed=2, min_score_samples=1)
    assert torch.equal(logits_of(one, samples), logits_of(two, samples))
    assert not torch.equal(logits_of(one, samples), logits_of(other, samples))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sublayer_with_nothing_left_keeps_its_tuned_bias(attention: str) -> None:
    model, samples = tiny_bert(attention=attention, layers=3), sequences(40)
    pruned = run(model, padded(samples), reduction=0.97)
    empty = [row for row in pruned.kprune_report.sublayers if row.units == 0]
    assert empty
    for row in empty:
        module = pruned.get_submodule(row.name)
        assert module.weight.shape == (24, 0)
        assert not torch.equal(module.bias, model.get_submodule(row.name).bias)
        assert row.error == pytest.approx(1.0, abs=1e-6)
    assert logits_of(pruned, samples).isfinite().all()


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (1, None),
        (3, "regression"),
        (4, "multi_label_classification"),
        (2, "single_label_classification"),
        (30, None),
    ],
)
def test_every_kind_of_classification_head(labels: int, problem: str | None) -> None:
    model = tiny_bert(labels=labels, problem_type=problem, neurons=200)
    pruned = run(model, padded(sequences(40)), reduction=0.5, max_score_passes=5)
    assert pruned.kprune_report.flops <= 0.5 * pruned.kprune_report.flops_before
    assert logits_of(pruned, sequences(3)).shape == (3, labels)


def test_mu_moves_units_between_heads_and_neurons() -> None:
    model, batches = tiny_bert(neurons=100), padded(sequences())

    def heads(mu: float | None) -> int:
        rows = run(model, batches, mu=mu).config.kprune["layers"]
        return sum(row["num_heads"] for row in rows)

    assert heads(1e9) > heads(1e-9)
    assert heads(None) == heads(6.0)  # the head size


def test_calibration_stops_at_max_tokens() -> None:
    samples = sequences(30)
    report = run(tiny_bert(), padded(samples), max_tokens=50).kprune_report
    counts = torch.tensor([len(ids) for ids in samples]).cumsum(0)
    expected = int((counts <= 50).sum())
    assert (report.samples, report.tokens) == (expected, int(counts[expected - 1]))


def test_bfloat16_model() -> None:
    pruned = run(tiny_bert(neurons=100, dtype=torch.bfloat16), padded(sequences()))
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    assert logits_of(pruned, sequences(3)).isfinite().all()


def test_the_report_reads_well_and_goes_through_json() -> None:
    model = tiny_bert(neurons=200)
    pruned = run(model, padded(sequences()), reduction=0.5, sequence_length=16)
    report = pruned.kprune_report
    assert KPruneReport.from_dict(report.to_dict()) == report
    assert '"sequence_length": 16' in report.to_json()
    text = str(report)
    assert len(text.splitlines()) == 1 + 4 + 6
    assert "heads" in text and "neurons" in text and "budget 50.0%" in text
    assert report.parameters == pruned.num_parameters()
    removed = sum(row.parameters_before - row.parameters for row in report.sublayers)
    assert report.parameters_before - report.parameters == removed
    assert all(0 <= row.error <= 1 for row in report.sublayers)
    assert any(row.error > 0.1 for row in report.sublayers)


def test_progress_is_shown(capfd) -> None:
    kprune(tiny_bert(), padded(sequences(8)))
    assert "4/4" in capfd.readouterr().err


def test_config_of_a_dense_bert_is_left_dense() -> None:
    model = tiny_bert()
    pruned = run(model, padded(sequences(8)))
    assert type(model.config) is BertConfig
    assert not hasattr(model.config, "kprune")
    assert pruned.config.num_attention_heads == 4
    assert pruned.config.intermediate_size == 40
