"""Pruning of causal language models from data to a result that transformers loads."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

import kprune_ext.preparation.data
from kprune_ext import KPruneConfig, KPruneReport, kprune
from kprune_ext.architectures.table import find_architecture
from kprune_ext.preparation.rehearsal import rehearse
from kprune_ext.preparation.run import prepared
from kprune_ext.pruning import prune_sublayers
from kprune_ext.units.sublayers import sublayers
from tests.helpers.kprune import assert_same_state, run, state_of
from tests.helpers.kprune_decoders import (
    DECODER_CASES,
    DECODERS,
    decoder_batches,
    equal_texts,
    tiny_decoder,
)

WIDE = {"intermediate_size": 600}


def wide(**options):
    """A decoder with so many neurons that one of them is a small part of the budget."""
    return tiny_decoder("llama", **(WIDE | options))


@torch.no_grad()
def mean_loss(model, batches) -> float:
    total = count = 0
    for batch in batches:
        logits = model(**batch, use_cache=False).logits[:, :-1].double()
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        before = batch["attention_mask"][:, :-1] == 0
        labels = labels.masked_fill(before, -100)
        total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@torch.no_grad()
def divergence(model, pruned, batches) -> float:
    """Mean divergence of the predictions from the original's."""
    own, wanted = (
        torch.cat([m(**b, use_cache=False).logits[b["attention_mask"] != 0] for b in batches])
        for m in (pruned, model)
    )
    return float(
        kl_div(own.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
    )


@pytest.mark.parametrize("metric", ["params", "flops"])
@pytest.mark.parametrize("reduction", [0.2, 0.5])
def test_the_budget_is_met(metric: str, reduction: float) -> None:
    model = wide()
    pruned = run(model, decoder_batches(), reduction=reduction, metric=metric)
    report = pruned.kprune_report
    share = report.cost / report.cost_before
    assert 0 <= 1 - reduction - share < 0.005
    if metric == "params":
        assert report.cost_before - report.cost == model.num_parameters() - pruned.num_parameters()


def test_the_default_of_decoders_is_parameters_measured_once(monkeypatch) -> None:
    counted = []
    import kprune_ext.steps

    real = kprune_ext.steps.measure_knowledge
    monkeypatch.setattr(
        kprune_ext.steps, "measure_knowledge", lambda *a, **k: counted.append(1) or real(*a, **k)
    )
    report = run(wide(), decoder_batches(), reduction=0.3).kprune_report
    assert report.metric == "params" and counted == [1]
    run(wide(), decoder_batches(), reduction=0.3, schedule="per_layer")
    assert len(counted) == 4


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_is_pruned_saved_and_loaded(family: str, tmp_path) -> None:
    model, batches = tiny_decoder(family), decoder_batches(30)
    before = state_of(model)
    pruned = run(model, batches, reduction=0.3)
    assert_same_state(before, state_of(model))
    assert pruned.kprune_report.cost <= 0.7 * pruned.kprune_report.cost_before
    naive = divergence(
        model, run(model, batches, reduction=0.3, ridge=1e9, tune_bias=False), batches
    )
    assert divergence(model, pruned, batches) < naive
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = equal_texts()
    with torch.no_grad():
        assert torch.equal(pruned(**batch).logits, loaded(**batch).logits)
        texts = [m.generate(**batch, max_new_tokens=4, do_sample=False) for m in (pruned, loaded)]
    assert torch.equal(*texts)
    stored = KPruneReport.from_dict(pruned.kprune_report.to_dict())
    assert stored == pruned.kprune_report


OTHER_TASKS = [
    (family, task)
    for family, task in DECODER_CASES
    if task != "language" and family in ("llama", "gemma2", "gemma3", "gpt2")
]


@pytest.mark.parametrize(("family", "task"), OTHER_TASKS)
def test_other_tasks_of_decoders(family: str, task: str) -> None:
    model = tiny_decoder(family, task)
    before = state_of(model)
    pruned = run(model, decoder_batches(), reduction=0.3)
    assert_same_state(before, state_of(model))
    assert pruned.kprune_report.perplexity is None
    assert pruned.kprune_report.cost <= 0.7 * pruned.kprune_report.cost_before


def test_padding_and_the_order_of_batches_make_no_difference() -> None:
    model = wide()
    results = [
        run(model, batches, reduction=0.3)
        for batches in (
            decoder_batches(side="left"),
            decoder_batches(side="right"),
            decoder_batches(side="left", batch=1),
        )
    ]
    batch = equal_texts()
    with torch.no_grad():
        first, *others = [result(**batch).logits for result in results]
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("round_to", [1, 64])
def test_uniform_layers_have_the_same_sizes(round_to: int) -> None:
    model = wide()
    pruned = run(model, decoder_batches(), reduction=0.3, layout="uniform", round_to=round_to)
    report = pruned.kprune_report
    sizes = {(row.kind, row.units) for row in report.sublayers}
    assert len(sizes) == 2
    assert dict(sizes)["ffn"] % round_to == 0
    chosen = [row.kept_units for row in report.sublayers if row.kind == "ffn"]
    assert len(set(chosen)) > 1  # which ones, differs
    assert {len(units) for units in chosen} == {pruned.config.intermediate_size}
    assert 0.6 < report.cost / report.cost_before <= 0.7


def test_free_layers_have_neurons_in_multiples() -> None:
    report = run(wide(), decoder_batches(), reduction=0.3, round_to=64).kprune_report
    neurons = [row.units for row in report.sublayers if row.kind == "ffn"]
    assert all(n % 64 == 0 or n == 600 for n in neurons) and len(set(neurons)) > 1
    assert 0.6 < report.cost / report.cost_before <= 0.7


def test_the_cache_is_halved_and_all_neurons_stay() -> None:
    pruned = run(tiny_decoder("llama"), decoder_batches(), reduction=0.5, metric="cache")
    report = pruned.kprune_report
    assert sum(row.units for row in report.sublayers if row.kind == "attention") == 4  # of 9
    assert all(row.units == row.units_before for row in report.sublayers if row.kind == "ffn")
    assert "bytes of the key-value cache per token: 44.4% kept, budget 50.0%" in str(report)


def test_perplexities_of_held_out_samples(monkeypatch) -> None:
    model, batches = wide(), decoder_batches(40)
    held = []
    real = kprune_ext.preparation.data.shared_data

    def noted(*args, **options):
        data = real(*args, **options)
        held.extend(data.held_out)
        return data

    monkeypatch.setattr(kprune_ext.preparation.data, "shared_data", noted)
    pruned = run(model, batches, reduction=0.4, held_out=0.2)
    report = pruned.kprune_report
    assert len(held) == 8 and report.samples == 32
    alone = [
        {
            "input_ids": s.inputs["input_ids"],
            "attention_mask": torch.ones_like(s.inputs["input_ids"]),
        }
        for s in held
    ]
    assert report.held_out_tokens == sum(s.count - 1 for s in held)
    assert report.perplexity_before == pytest.approx(math.exp(mean_loss(model, alone)), rel=1e-4)
    assert report.perplexity == pytest.approx(math.exp(mean_loss(pruned, alone)), rel=1e-4)
    assert f"perplexity on {report.held_out_tokens} held-out tokens" in str(report)
    none = run(model, batches, reduction=0.4, held_out=0.0).kprune_report
    assert none.perplexity is None and none.samples == 40 and "perplexity" not in str(none)


def test_other_units_can_be_given_to_the_same_tuning() -> None:
    model = wide()
    keep = [[0, 2], list(range(0, 600, 2))] * 3
    config = KPruneConfig(reduction=0.4)
    with prepared(model, decoder_batches(), config) as ready:
        outcome = prune_sublayers(ready, keep)
        found = sublayers(ready.pruned, find_architecture(ready.pruned))
        assert [target.units for target in found] == [len(units) for units in keep]
    assert outcome.kept == keep and all(0 < error < 1 for error in outcome.errors)


def sizes_with(kind: str, **options) -> list[float]:
    """Shares of the units that are kept, by layer."""
    report = run(wide(), decoder_batches(), reduction=0.5, **options).kprune_report
    return [row.units / row.units_before for row in report.sublayers if row.kind == kind]


def test_scores_can_be_balanced_between_layers() -> None:
    plain, alike = (sizes_with("ffn", min_share=0.0, balance=b) for b in (0.0, 1.0))
    assert max(alike) - min(alike) < 0.5 * (max(plain) - min(plain))


def test_lower_bounds_hold_for_each_kind() -> None:
    assert min(sizes_with("ffn", min_share=1.0)) > 0.45
    assert min(sizes_with("ffn", min_share=0.0, min_head_share=1.0)) < 0.45


def test_the_papers_signal_and_schedule() -> None:
    model = wide()
    pruned = kprune(
        model, decoder_batches(), KPruneConfig.paper(0.3, metric="params"), progress=False
    )
    assert 0.695 < pruned.kprune_report.cost / pruned.kprune_report.cost_before <= 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    model = wide(dtype=dtype)
    batches = decoder_batches()
    pruned = run(model, batches, reduction=0.3)
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    naive = run(model, batches, reduction=0.3, ridge=1e9)
    assert divergence(model, pruned, batches) < divergence(model, naive, batches)


def test_hidden_states_in_a_file_give_the_same_model() -> None:
    model, batches = wide(), decoder_batches()
    held, spilled = (
        run(model, batches, reduction=0.3, max_state_memory=size) for size in ("1GiB", 1000)
    )
    batch = equal_texts()
    with torch.no_grad():
        assert torch.equal(held(**batch).logits, spilled(**batch).logits)


def test_a_rehearsal_finds_nothing_to_object_to() -> None:
    assert rehearse(wide(), decoder_batches(), KPruneConfig(reduction=0.3)) is None
    with pytest.raises(ValueError, match="cannot be reached"):
        rehearse(wide(), decoder_batches(), KPruneConfig(reduction=0.99999))
