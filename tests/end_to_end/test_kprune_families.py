"""Every family and task: pruned to its budget, run, saved and reloaded."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, DebertaV2ForSequenceClassification

from kprune_ext import KPruneConfig, kprune
from kprune_ext.architectures.table import ARCHITECTURES, find_architecture
from kprune_ext.model_layers.layer_stack import LayerStack
from kprune_ext.modeling.classes import kept_units
from kprune_ext.modeling.copying import record_kept, uneven_copy
from kprune_ext.units.sublayers import sublayers
from kprune_ext.units.surgery import shrink
from tests.helpers.kprune_models import (
    CASES,
    FAMILIES,
    HEADS,
    HIDDEN,
    auto_class,
    batches_for,
    outputs_of,
    tiny,
)


def test_every_encoder_of_the_table_is_tested() -> None:
    encoders = {row.model_type for row in ARCHITECTURES if not row.is_causal}
    assert {kind for kind, _, _ in FAMILIES.values()} == encoders


def counted_flops(model: torch.nn.Module, family: str, length: int) -> int:
    """FLOPs of all sub-layers on one sequence, counted while they run."""
    encoder = LayerStack(model, find_architecture(model))
    batch = batches_for(family, 1)[0]
    if "input_ids" in batch:
        ids = torch.full((1, length), 5)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    hidden, contexts = encoder.enter(batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for sublayer in sublayers(model, find_architecture(model)):
            hidden = sublayer.run(hidden, contexts[sublayer.layer])
    return counter.get_total_flops()


@pytest.mark.parametrize("reduction", [0.3, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_meet_the_budget_and_the_flop_counter(family: str, reduction: float) -> None:
    model = tiny(family, neurons=1200, attention="eager")
    length = 17  # of an image, too
    config = KPruneConfig(reduction=reduction, sequence_length=length)
    pruned = kprune(model, batches_for(family), config, progress=False)
    report = pruned.kprune_report
    assert report.flops_before == counted_flops(model, family, length)
    assert report.flops == counted_flops(pruned, family, length)
    budget = (1 - reduction) * report.flops_before
    assert 0.995 * budget <= report.flops <= budget
    assert pruned.num_parameters() < model.num_parameters()


@pytest.mark.parametrize(("family", "task"), CASES)
def test_runs_and_reloads(family: str, task: str, tmp_path) -> None:
    model, batches = tiny(family, task), batches_for(family)
    pruned = kprune(model, batches, KPruneConfig(reduction=0.5), progress=False)
    report = pruned.kprune_report
    assert report.flops <= 0.5 * report.flops_before
    expected = outputs_of(pruned, batches[0])
    dense = outputs_of(model, batches[0])
    assert [value.shape for value in expected] == [value.shape for value in dense]
    assert all(value.isfinite().all() for value in expected)
    pruned.save_pretrained(tmp_path)
    loaded = auto_class(task).from_pretrained(tmp_path)
    assert type(loaded) is type(pruned)
    for one, other in zip(outputs_of(loaded, batches[0]), expected, strict=True):
        assert torch.equal(one, other)
    assert AutoConfig.from_pretrained(tmp_path).kprune == pruned.config.kprune


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_is_seen_as_it_runs(family: str) -> None:
    """Entering, running all sub-layers and predicting is what the model itself does."""
    model, batch = tiny(family), batches_for(family)[0]
    encoder = LayerStack(model, find_architecture(model))
    with torch.no_grad():
        hidden, contexts = encoder.enter(batch)
        for sublayer in sublayers(model, find_architecture(model)):
            hidden = sublayer.run(hidden, contexts[sublayer.layer])
        logits = encoder.predict(lambda model, inputs: model(**inputs).logits, batch, hidden)
        torch.testing.assert_close(logits[:, 0], model(**batch).logits)
    assert {name for name, _ in model.named_modules()} == {
        name for name, _ in tiny(family).named_modules()
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_without_heads_or_neurons(family: str, attention: str, tmp_path) -> None:
    chosen = attention if getattr(tiny(family), "_supports_sdpa", False) else "eager"
    model, batches = tiny(family, attention=chosen), batches_for(family)
    pruned = uneven_copy(model)
    first, _, _, last = sublayers(pruned, find_architecture(pruned))
    shrink(first, [])
    shrink(last, [])
    whole = kept_units(model.config)[0]
    record_kept(pruned, [([], list(whole.neurons)), (list(whole.heads), [])])
    expected = outputs_of(pruned, batches[0])
    assert all(value.isfinite().all() for value in expected)
    assert not torch.allclose(expected[0], outputs_of(model, batches[0])[0])
    pruned.save_pretrained(tmp_path)
    loaded = type(pruned).from_pretrained(tmp_path, attn_implementation=chosen)
    assert torch.equal(outputs_of(loaded, batches[0])[0], expected[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_twice_it_keeps_the_right_heads(family: str, tmp_path) -> None:
    """What stays after two prunings must be cut out of the original by the indices of both."""
    model, batches = tiny(family, neurons=96), batches_for(family)
    once = kprune(model, batches, KPruneConfig(reduction=0.3, mu=40.0), progress=False)
    twice = kprune(once, batches, KPruneConfig(reduction=0.2, mu=40.0), progress=False)
    twice.save_pretrained(tmp_path)
    loaded = type(twice).from_pretrained(tmp_path)
    assert torch.equal(outputs_of(loaded, batches[0])[0], outputs_of(twice, batches[0])[0])
    before, after = (sublayers(m, find_architecture(m)) for m in (model, twice))
    size = HIDDEN // HEADS
    for number, row in enumerate(kept_units(twice.config)):
        for kind, units, unit_size in ((0, row.heads, size), (1, row.neurons, 1)):
            dense, small = before[2 * number + kind], after[2 * number + kind]
            stacked = dense.paths.stacked
            for one, other in zip(dense.inputs, small.inputs, strict=True):
                blocks = one.weight.view(stacked, -1, unit_size, HIDDEN)[:, list(units)]
                assert torch.equal(other.weight, blocks.flatten(0, 2))


def test_deberta_with_a_convolution_is_refused() -> None:
    model = tiny("deberta-v2", conv_kernel_size=3)
    assert type(model) is DebertaV2ForSequenceClassification
    with pytest.raises(ValueError, match="convolution stands between its layers"):
        kprune(model, batches_for("deberta-v2"), progress=False)
