"""The config field with the kept units, and the registration with transformers."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    ElectraConfig,
)

import kprune_ext
from kprune_ext import KPruneConfig, kprune, modeling
from kprune_ext.architectures import row as architectures
from kprune_ext.architectures.table import find_architecture
from kprune_ext.units import kept
from kprune_ext.units.kept import kept_units
from tests.helpers.kprune import padded, sequences, tiny_bert


@given(st.sets(st.integers(0, 300)))
def test_indices_survive_their_short_form(indices: set[int]) -> None:
    ascending = tuple(sorted(indices))
    assert kept.decode_indices(kept.encode_indices(ascending)) == ascending


def test_indices_are_stored_as_runs() -> None:
    assert kept.encode_indices([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert kept.encode_indices([]) == ""


@pytest.mark.parametrize("text", ["3-1", "1,1", "2,1", "a", "1,", "-", "0-99999999999"])
def test_malformed_indices(text: str) -> None:
    with pytest.raises(ValueError):
        kept.decode_indices(text)


def test_a_config_that_says_nothing_keeps_everything() -> None:
    config = modeling.KPruneBertConfig(
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=5, hidden_size=8
    )
    assert kept_units(config) == [kept.KeptUnits((0, 1), (0, 1, 2, 3, 4))] * 2


def _drop_layer(stored: dict) -> None:
    stored["layers"].pop()


def _miscount(stored: dict) -> None:
    stored["layers"][0]["num_neurons"] += 1


def _out_of_range(stored: dict) -> None:
    stored["layers"][1].update(neurons="400", num_neurons=1)


def _other_format(stored: dict) -> None:
    stored["format"] = 99


def _malformed(stored: dict) -> None:
    stored["layers"][0]["heads"] = "x"


def _no_layers(stored: dict) -> None:
    del stored["layers"]


@pytest.mark.parametrize(
    "damage", [_drop_layer, _miscount, _out_of_range, _other_format, _malformed, _no_layers]
)
def test_a_tampered_config_gives_one_clear_error(damage, tmp_path) -> None:
    kprune(tiny_bert(), padded(sequences(8)), progress=False).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    damage(config["kprune"])
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="field 'kprune' of this model's config is damaged"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_sizes_that_do_not_fit_the_weights_are_refused(tmp_path) -> None:
    kprune(tiny_bert(), padded(sequences(8)), progress=False).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["kprune"]["layers"][0].update(neurons="0-2", num_neurons=3)
    path.write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_registering_twice_is_safe() -> None:
    modeling.register()
    importlib.reload(kprune_ext)
    assert AutoConfig.for_model("kprune_ext_bert").model_type == "kprune_ext_bert"


def test_a_name_taken_by_another_package_is_reported(monkeypatch) -> None:
    class KPruneBertConfig(BertConfig):
        model_type = "kprune_ext_bert"

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "kprune_ext_bert", KPruneBertConfig)
    with pytest.raises(
        RuntimeError, match=r"'kprune_ext_bert' is already registered.*Import only one"
    ):
        modeling.register()


def test_importing_replaces_nothing_of_transformers_and_starts_no_cuda() -> None:
    script = """
import importlib, inspect, sys
import torch, transformers
for name in ("Trainer", "TrainerCallback", "pipeline", "PreTrainedModel", "AutoModel"):
    getattr(transformers, name)
families = ("bert", "roberta", "xlm_roberta", "camembert", "electra", "distilbert", "mpnet",
            "deberta_v2", "modernbert", "vit", "dinov2")
for family in families:
    for part in ("modeling", "configuration"):
        importlib.import_module(f"transformers.models.{family}.{part}_{family}")

def identities():
    found = {}
    for module_name, module in list(sys.modules.items()):
        if not (module_name + ".").startswith("transformers.") and module is not torch.nn:
            continue
        for name, value in list(vars(module).items()):
            if inspect.isclass(value) or inspect.isroutine(value):
                found[module_name, name] = value
            if inspect.isclass(value):
                for member, attribute in list(vars(value).items()):
                    if inspect.isroutine(attribute) or isinstance(attribute, property):
                        found[module_name, name, member] = attribute
    return found

before = identities()
import kprune_ext
assert len(before) > 10_000, len(before)
after = identities()
changed = [key for key, value in before.items() if after.get(key) is not value]
assert not changed, changed
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_a_copy_shares_no_memory_and_takes_no_random_numbers() -> None:
    model = tiny_bert()
    state = torch.get_rng_state()
    copy = modeling.uneven_copy(model)
    assert torch.equal(torch.get_rng_state(), state)
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert pointers.isdisjoint(parameter.data_ptr() for parameter in copy.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value)


def test_pruning_twice_refers_to_the_original_model() -> None:
    model, batches = tiny_bert(neurons=80), padded(sequences())
    once = kprune(model, batches, KPruneConfig(reduction=0.3), progress=False)
    twice = kprune(once, batches, KPruneConfig(reduction=0.3), progress=False)
    for before, after in zip(kept_units(once.config), kept_units(twice.config), strict=True):
        assert set(after.heads) <= set(before.heads)
        assert set(after.neurons) <= set(before.neurons)
    assert twice.kprune_report.flops_before == once.kprune_report.flops
    for number, row in enumerate(kept_units(twice.config)):
        neurons = torch.tensor(row.neurons, dtype=torch.long)
        original = model.bert.encoder.layer[number].intermediate.dense.weight[neurons]
        assert torch.equal(twice.bert.encoder.layer[number].intermediate.dense.weight, original)


def test_a_family_of_a_later_transformers_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(architectures, "_has_transformers", lambda oldest: oldest < "5")
    assert find_architecture(tiny_bert()).model_type == "bert"
    config = ElectraConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = AutoModel.from_config(config)
    with pytest.raises(ValueError, match=r"electra .* needs transformers 5.0 or newer, but"):
        find_architecture(model)
