"""Pruned models with layers of equal size: models of transformers, with our report beside them."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from kprune_ext import KPruneConfig, KPruneReport, kprune, load_report
from kprune_ext.architectures.table import find_architecture
from kprune_ext.modeling.classes import PlainLayers, UnevenLayers
from kprune_ext.units.kept import decode_indices
from kprune_ext.units.sublayers import sublayers
from tests.helpers.kprune import padded, sequences, tiny_bert
from tests.helpers.kprune import run as prune
from tests.helpers.kprune_checkpoints import batch, equal_cut, load
from tests.helpers.kprune_decoders import (
    CUTS,
    DECODERS,
    cut,
    decoder_batches,
    equal_texts,
    tiny_decoder,
)
from tests.helpers.kprune_models import FAMILIES, auto_class, outputs_of, tiny

REPORT = "kprune_report.json"
UNIFORM = KPruneConfig(reduction=0.25, layout="uniform")
EVERY = [(family, "language") for family in DECODERS] + [(family, None) for family in FAMILIES]


def dense(family: str, task: str | None) -> Any:
    return tiny(family) if task is None else tiny_decoder(family, task)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(("family", "task"), EVERY)
def test_in_memory_it_is_what_transformers_loads(family: str, task: str | None, tmp_path) -> None:
    model = dense(family, task)
    pruned = equal_cut(model)
    assert isinstance(pruned, type(model)) and isinstance(pruned, PlainLayers)
    pruned.save_pretrained(tmp_path / "pruned")
    model.save_pretrained(tmp_path / "dense")
    written, own = config_of(tmp_path / "pruned"), config_of(tmp_path / "dense")
    assert "kprune" not in json.dumps(written)
    assert (written["model_type"], written["architectures"]) == (
        own["model_type"],
        own["architectures"],
    )
    assert written.keys() - own.keys() <= {"head_dim"}
    auto = pruned.kprune_auto
    loaded = auto.from_pretrained(tmp_path / "pruned")
    assert type(loaded) is type(model)
    for (name, one), (other_name, other) in zip(
        pruned.named_modules(), loaded.named_modules(), strict=True
    ):
        assert name == other_name and (type(one) is type(other) or one is pruned)
        numbers = {key: value for key, value in vars(one).items() if type(value) in (int, float)}
        assert numbers.items() <= vars(other).items(), name
    assert loaded.config.to_dict() | {"_name_or_path": ""} == pruned.config.to_dict() | {
        "_name_or_path": ""
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "modernbert"])
def test_the_report_lists_the_units_that_are_kept(family: str, tmp_path) -> None:
    is_decoder = family in DECODERS
    model = tiny_decoder(family) if is_decoder else tiny(family)
    batches = decoder_batches() if is_decoder else padded([ids.clamp(min=3) for ids in sequences()])
    pruned: Any = kprune(model, batches, UNIFORM, progress=False)
    pruned.save_pretrained(tmp_path)
    report = load_report(tmp_path)
    assert report == pruned.kprune_report == KPruneReport.from_dict(report.to_dict())
    pairs = (sublayers(m, find_architecture(m)) for m in (model, pruned))
    for before, after, row in zip(*pairs, report.sublayers, strict=True):
        assert row.kept_units is not None and len(row.kept_units) == after.units
        for one, other, sizes in zip(before.inputs, after.inputs, before.rows, strict=True):
            start = end = 0
            for size in sizes:  # of each matrix that is stacked
                part = one.weight if is_decoder and family == "gpt2" else one.weight.T
                part = part[:, start : start + size * before.units]
                wanted = part.unflatten(1, (-1, size))[:, list(row.kept_units)].flatten(1)
                whole = other.weight if family == "gpt2" else other.weight.T
                assert torch.equal(whole[:, end : end + size * after.units], wanted)
                start, end = start + size * before.units, end + size * after.units
    shapes = {
        kind: {r.units for r in report.sublayers if r.kind == kind} for kind in ("attention", "ffn")
    }
    assert all(len(sizes) == 1 for sizes in shapes.values())
    card = (tmp_path / "README.md").read_text()
    assert "transformers loads it as any other model" in card and "import kprune_ext" not in card


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("metric", ["flops", "params"])
def test_an_encoder_keeps_its_heads_and_meets_the_budget(round_to: int, metric: Any) -> None:
    options = {"reduction": 0.2, "layout": "uniform", "round_to": round_to, "metric": metric}
    pruned = prune(tiny_bert(neurons=400), padded(sequences()), **options)
    assert type(pruned).__name__ == "BertForSequenceClassification"
    assert pruned.config.num_attention_heads == 4
    assert pruned.config.intermediate_size % round_to == 0
    report = pruned.kprune_report
    assert 0.78 < report.cost / report.cost_before <= 0.8


def test_a_budget_out_of_reach_is_told_before_the_work(monkeypatch) -> None:
    import kprune_ext.steps

    monkeypatch.setattr(kprune_ext.steps, "measure_knowledge", None)
    with pytest.raises(ValueError, match="all 4 heads, as a plain BertConfig cannot name fewer"):
        prune(tiny_bert(), padded(sequences()), reduction=0.8, layout="uniform")


def test_copies_and_pickles_stay_what_they_are(pruned_uniform) -> None:
    for same in (copy.deepcopy(pruned_uniform), pickle.loads(pickle.dumps(pruned_uniform))):
        assert type(same) is type(pruned_uniform) and same is not pruned_uniform
        assert same.kprune_report == pruned_uniform.kprune_report
        assert torch.equal(same(**batch()).logits, pruned_uniform(**batch()).logits)


@pytest.fixture(scope="module")
def pruned_uniform() -> Any:
    return kprune(tiny_bert(), padded(sequences()), UNIFORM, progress=False)


def test_its_own_class_loads_the_report_and_saves_it_again(pruned_uniform, tmp_path) -> None:
    pruned_uniform.save_pretrained(tmp_path / "one", self_contained=True)
    assert not list((tmp_path / "one").glob("*.py"))
    again, info = type(pruned_uniform).from_pretrained(tmp_path / "one", output_loading_info=True)
    assert again.kprune_report == pruned_uniform.kprune_report and not info["missing_keys"]
    again.save_pretrained(tmp_path / "two")
    assert load_report(tmp_path / "two") == pruned_uniform.kprune_report


def test_reports_that_do_not_belong_to_the_model(pruned_uniform, tmp_path, caplog) -> None:
    pruned_uniform.save_pretrained(tmp_path)
    text = (tmp_path / REPORT).read_text()
    for damaged, told in (
        ("{", "The report is left out, as it is damaged"),
        (json.dumps(json.loads(text) | {"sublayers": "ab"}), "it is damaged"),
        (text.replace('"kept": "', '"kept": "x'), "kept is 'x"),
    ):
        (tmp_path / REPORT).write_text(damaged)
        with pytest.raises(ValueError, match="equal size, which only its report tells"):
            load_report(tmp_path)
        assert told in caplog.text
        caplog.clear()
        assert torch.equal(load(tmp_path)(**batch()).logits, pruned_uniform(**batch()).logits)
    tiny_bert().save_pretrained(tmp_path)  # another model, in the same folder
    (tmp_path / REPORT).write_text(text)
    with pytest.raises(
        ValueError, match="was not pruned by kprune_ext, or to layers of equal size"
    ):
        load_report(tmp_path)
    with pytest.raises(ValueError, match="Pass the folder of a pruned model with its"):
        load_report(load(tmp_path))


def test_weights_that_do_not_fit_the_config_are_refused(pruned_uniform, tmp_path) -> None:
    pruned_uniform.save_pretrained(tmp_path)
    config = config_of(tmp_path)
    config["intermediate_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes|size mismatch"):
        load(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match="(?i)header|incomplete|metadata"):
        load(tmp_path)


class OwnBert(BertForSequenceClassification):
    """A class of a user."""


def test_a_users_own_class_is_saved_as_its_parent(tmp_path) -> None:
    model = OwnBert(tiny_bert().config)
    pruned: Any = kprune(model, padded(sequences()), UNIFORM, progress=False)
    assert isinstance(pruned, OwnBert) and not isinstance(pruned, UnevenLayers)
    pruned.save_pretrained(tmp_path)
    assert config_of(tmp_path)["architectures"] == ["BertForSequenceClassification"]
    assert torch.equal(load(tmp_path)(**batch()).logits, pruned(**batch()).logits)


def test_pruned_again_in_either_layout(tmp_path) -> None:
    model, batches = tiny_decoder("llama", intermediate_size=90), decoder_batches()
    texts = equal_texts()
    once = prune(model, batches, reduction=0.2, layout="uniform")
    twice = prune(once, batches, reduction=0.2, layout="uniform")
    free = prune(twice, batches, reduction=0.2)
    assert isinstance(free, UnevenLayers) and isinstance(twice, PlainLayers)
    assert free.config.intermediate_size == twice.config.intermediate_size
    equal = prune(free, batches, reduction=0.3, layout="uniform")
    assert twice.num_parameters() > free.num_parameters() > equal.num_parameters()
    for number, pruned in enumerate((twice, free, equal)):
        pruned.save_pretrained(tmp_path / str(number))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        expected = outputs_of(pruned, texts)[0]
        torch.testing.assert_close(outputs_of(loaded, texts)[0], expected, rtol=1e-5, atol=1e-5)
    # Units are numbered as in the model before the free pruning, of whose result some are kept.
    kept = [row.kept_units for row in equal.kprune_report.sublayers if row.kind == "ffn"]
    for units, layer in zip(kept, free.config.kprune["layers"], strict=True):
        assert set(units) <= set(decode_indices(layer["neurons"]))


def test_layers_without_heads_cannot_become_equal() -> None:
    pruned = cut(tiny_decoder("llama"), CUTS["no heads first"])
    with pytest.raises(
        ValueError, match="this model was pruned before, and its smallest layer keeps"
    ):
        prune(pruned, decoder_batches(), reduction=0.1, layout="uniform")


def test_adapters_name_the_class_of_transformers(pruned_uniform, tmp_path) -> None:
    adapted = get_peft_model(copy.deepcopy(pruned_uniform), LoraConfig(target_modules=["query"]))
    adapted.save_pretrained(tmp_path)
    mapping = PeftConfig.from_pretrained(tmp_path).auto_mapping
    assert mapping["base_model_class"] == "BertForSequenceClassification"
    assert mapping["parent_library"] == "transformers.models.bert.modeling_bert"


def test_a_free_checkpoint_in_the_folder_is_replaced(pruned, pruned_uniform, tmp_path) -> None:
    pruned.save_pretrained(tmp_path, self_contained=True)
    pruned_uniform.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "kprune" not in config_of(tmp_path)
    assert (tmp_path / "README.md").read_text().count("kprune_ext: start") == 1
    assert type(load(tmp_path)) is BertForSequenceClassification
    pruned.save_pretrained(tmp_path)
    assert (
        isinstance(load(tmp_path), UnevenLayers) and load_report(tmp_path) == pruned.kprune_report
    )


def test_sentence_transformers_load_it_without_the_package(tmp_path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer

    from tests.helpers.kprune import word_tokenizer

    tiny("mpnet", "embeddings").save_pretrained(tmp_path / "encoder")
    word_tokenizer(tmp_path / "encoder").save_pretrained(tmp_path / "encoder")
    encoder = Transformer(str(tmp_path / "encoder"))
    whole = library.SentenceTransformer(modules=[encoder, Pooling(24)], device="cpu")
    batches = [
        {k: v.clamp(min=1) if k == "input_ids" else v for k, v in b.items()}
        for b in padded(sequences())
    ]
    pruned: Any = kprune(whole, batches, UNIFORM, progress=False)
    pruned.save_pretrained(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    inner = again[0].auto_model
    assert type(inner) is auto_class("embeddings").from_pretrained(tmp_path / "encoder").__class__
    texts = ["word3 word4", "word5 word6 word7 word8"]
    assert (again.encode(texts) == pruned.encode(texts)).all()
