"""Every family and task of decoders: pruned to its budget, run, saved and reloaded."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kprune_ext import KPruneConfig, kprune
from kprune_ext.architectures.table import find_architecture
from kprune_ext.model_layers.layer_stack import LayerStack
from kprune_ext.modeling.classes import kept_units
from kprune_ext.units.sublayers import sublayers
from tests.helpers.kprune_decoders import (
    DECODER_CASES,
    DECODERS,
    TASK_CLASSES,
    decoder_batches,
    equal_texts,
    tiny_decoder,
)
from tests.helpers.kprune_models import outputs_of

_WIDE = {"intermediate_size": 800, "ffn_dim": 800, "n_inner": 800}


def _wide(family: str, **options: Any) -> Any:
    """A decoder with so many neurons that a budget can be met within 0.5 %."""
    wide = {name: size for name, size in _WIDE.items() if name in DECODERS[family][1]}
    return tiny_decoder(family, **wide, **options)


def counted_flops(model: torch.nn.Module, length: int) -> int:
    """FLOPs of all sub-layers on one sequence, counted while they run."""
    stack = LayerStack(model, find_architecture(model))
    hidden, contexts = stack.enter({"input_ids": torch.full((1, length), 5), "use_cache": False})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for sublayer in sublayers(model, find_architecture(model)):
            hidden = sublayer.run(hidden, contexts[sublayer.layer])
    return counter.get_total_flops()


@pytest.mark.parametrize("family", DECODERS)
def test_flops_meet_the_budget_and_the_flop_counter(family: str) -> None:
    model, length = _wide(family, attn_implementation="eager"), 17
    config = KPruneConfig(reduction=0.4, metric="flops", sequence_length=length)
    pruned: Any = kprune(model, decoder_batches(), config, progress=False)
    report = pruned.kprune_report
    assert report.flops_before == counted_flops(model, length)
    assert report.flops == counted_flops(pruned, length)
    assert 0.995 * 0.6 * report.flops_before <= report.flops <= 0.6 * report.flops_before


@pytest.mark.parametrize("family", DECODERS)
def test_parameters_meet_the_budget_and_are_really_gone(family: str) -> None:
    model = _wide(family)
    pruned: Any = kprune(model, decoder_batches(), KPruneConfig(reduction=0.3), progress=False)
    report = pruned.kprune_report
    assert report.metric == "params"
    assert 0.995 * 0.7 * report.cost_before <= report.cost <= 0.7 * report.cost_before
    gone = model.num_parameters() - pruned.num_parameters()
    assert gone == report.cost_before - report.cost
    assert report.parameters == pruned.num_parameters()


@pytest.mark.parametrize(("family", "task"), DECODER_CASES)
def test_runs_and_reloads(family: str, task: str, tmp_path: Any) -> None:
    model = tiny_decoder(family, task)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is lost on saving
        pruned: Any = kprune(
            model, decoder_batches(side="right"), KPruneConfig(reduction=0.4), progress=False
        )
    kept = kept_units(pruned.config)
    found = [size for row in kept for size in (len(row.heads), len(row.neurons))]
    assert found == [row.units for row in pruned.kprune_report.sublayers]
    batch = equal_texts()
    expected, dense = outputs_of(pruned, batch), outputs_of(model, batch)
    assert [value.shape for value in expected] == [value.shape for value in dense]
    assert all(value.isfinite().all() for value in expected)
    pruned.save_pretrained(tmp_path)
    loaded = TASK_CLASSES[task].from_pretrained(tmp_path)
    assert type(loaded) is type(pruned) and loaded.kprune_report == pruned.kprune_report
    for one, other in zip(outputs_of(loaded, batch), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_the_layers_are_seen_as_they_run(family: str) -> None:
    """Entering, running all sub-layers and predicting is what the model itself does."""
    model, batch = tiny_decoder(family), decoder_batches(4, side="right")[0]
    stack = LayerStack(model, find_architecture(model))
    with torch.no_grad():
        hidden, contexts = stack.enter(batch | {"use_cache": False})
        for sublayer in sublayers(model, find_architecture(model)):
            hidden = sublayer.run(hidden, contexts[sublayer.layer])
        logits = stack.predict(lambda model, inputs: model(**inputs).logits, batch, hidden)
        expected = model(**batch).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[seen], expected[seen])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_report_names_the_units(family: str) -> None:
    pruned: Any = kprune(tiny_decoder(family), decoder_batches(), progress=False)
    report = pruned.kprune_report
    unit = "heads" if family == "gpt2" else "key-value groups"
    assert f"| layer | {unit} | neurons |" in report.markdown()
    assert f"parameters of {unit} and neurons: " in str(report)
    assert report.sublayers[0].query_heads == (1 if family == "gpt2" else 2)


def test_a_body_that_reads_both_ways_is_an_embedder() -> None:
    """As EmbeddingGemma is built: Gemma 3 whose tokens also see those after them."""
    model = tiny_decoder("gemma3", "embeddings", use_bidirectional_attention=True)
    pruned: Any = kprune(model, decoder_batches(), KPruneConfig(reduction=0.3), progress=False)
    batch = equal_texts()
    changed = batch["input_ids"].clone()
    changed[:, 1] = 3 + (changed[:, 1] - 2) % 57
    one = outputs_of(pruned, batch)[0]
    other = outputs_of(pruned, batch | {"input_ids": changed})[0]
    assert not torch.allclose(one[:, 0], other[:, 0])
    assert one.isfinite().all()


def test_the_only_group_of_a_layer_stays_unless_it_is_asked_for() -> None:
    model = tiny_decoder("gemma3", num_key_value_heads=1, intermediate_size=400)
    assert all(
        len(layer.self_attn.k_proj.weight) == layer.self_attn.head_dim
        for layer in model.model.layers
    )
    with torch.no_grad():
        for layer in model.model.layers:  # knows next to nothing
            layer.self_attn.o_proj.weight.mul_(1e-4)
            layer.post_attention_layernorm.weight.fill_(-0.9999)
    batches = decoder_batches(16)

    def groups(**options) -> list[int]:
        config = KPruneConfig(reduction=0.4, measure_speed=False, **options)
        report = kprune(model, batches, config, progress=False).kprune_report
        return [row.units for row in report.sublayers if row.kind == "attention"]

    assert groups() == [1] * len(model.model.layers)
    assert sum(groups(min_head_share=0.0)) < len(model.model.layers)
