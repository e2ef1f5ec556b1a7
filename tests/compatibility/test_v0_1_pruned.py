"""Pruned models of version 0.1, and adapters that were trained on them."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

import kprune_ext
from kprune_ext import KPruneConfig, kprune, load_report
from kprune_ext.architectures import ARCHITECTURES
from tests.helpers.v0_1 import (
    Batch,
    check_converted,
    check_numbers,
    check_outputs,
    check_same,
    expected,
    images,
    read_json,
    text,
)

#: Family and Auto class of each pruned model.
PRUNED: dict[str, tuple[str, Any]] = {
    "bert": ("bert", AutoModelForSequenceClassification),
    "bert-self-contained": ("bert", AutoModelForSequenceClassification),
    "bert-empty-sublayers": ("bert", AutoModelForSequenceClassification),
    "bert-bfloat16": ("bert", AutoModelForSequenceClassification),
    "bert-latency": ("bert", AutoModelForSequenceClassification),
    "distilbert": ("distilbert", AutoModelForSequenceClassification),
    "modernbert": ("modernbert", AutoModelForMaskedLM),
    "modernbert-self-contained": ("modernbert", AutoModelForMaskedLM),
    "deberta-v2": ("deberta-v2", AutoModelForSequenceClassification),
    "mpnet": ("mpnet", AutoModel),
    "vit": ("vit", AutoModelForImageClassification),
}
SELF_CONTAINED = [name for name in PRUNED if name.endswith("self-contained")]


def pruned_inputs(name: str) -> Batch:
    return (images() if name == "vit" else text())[0]


def needs(family: str) -> None:
    if not all(row.is_available for row in ARCHITECTURES if row.model_type == family):
        pytest.skip(f"{family} needs a newer transformers")


def load_pruned(name: str, folder: str | Path | None = None) -> Any:
    family, auto = PRUNED[name]
    needs(family)
    return auto.from_pretrained(folder or f"pruned/{name}", dtype="auto").eval()


def copy_of(name: str, folder: Path) -> Path:
    """A pruned model as it was saved: the code beside it goes by another name in the repository."""
    shutil.copytree(f"pruned/{name}", folder)
    for path in folder.glob("*.py.txt"):
        path.rename(path.with_suffix(""))
    return folder


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_models_are_the_same_to_the_bit(name: str) -> None:
    model, wanted = load_pruned(name), expected("pruned", name)
    state = {
        key.removeprefix("state/"): wanted.pop(key)
        for key in list(wanted)
        if key.startswith("state/")
    }
    assert type(model).__name__ == read_json("expected/pruned.json")["classes"][name]
    check_same(dict(model.state_dict()), state)
    check_outputs(model, pruned_inputs(name), wanted)


@pytest.mark.parametrize("name", PRUNED)
def test_reports_of_pruned_models(name: str, tmp_path) -> None:
    """That of the pruning, and the one that is made from the config where there is none."""
    model = load_pruned(name)
    written = read_json(f"pruned/{name}/kprune_report.json")
    assert model.kprune_report == load_report(f"pruned/{name}") == load_report(model)
    check_numbers(model.kprune_report.to_dict(), written, rel=1e-12)
    kept = [row["units"] for row in written["sublayers"]]
    rows = AutoConfig.from_pretrained(f"pruned/{name}").kprune["layers"]
    assert kept == [row[size] for row in rows for size in ("num_heads", "num_neurons")]

    folder = copy_of(name, tmp_path / "model")
    (folder / "kprune_report.json").unlink()
    made = load_report(folder, 12).to_dict()
    check_numbers(made, read_json("expected/pruned.json")["reports from config"][name])


@pytest.mark.parametrize("name", PRUNED)
def test_saved_again_a_pruned_model_stays_what_it_is(name: str, tmp_path) -> None:
    folder = copy_of(name, tmp_path / "model")
    assert len(list(folder.glob("*.py"))) == (name in SELF_CONTAINED)
    model = load_pruned(name, folder)
    model.save_pretrained(folder)
    again = load_pruned(name, folder)
    check_same(dict(again.state_dict()), dict(model.state_dict()))
    assert again.config.kprune == model.config.kprune
    assert again.kprune_report == model.kprune_report
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.count("<!-- kprune_ext: start -->") == 1
    assert not list(folder.glob("*.py"))


@pytest.mark.parametrize("name", ["bert", "distilbert", "bert-self-contained", "vit"])
def test_an_old_pruned_model_is_pruned_further(name: str) -> None:
    model = load_pruned(name)
    data = images() if name == "vit" else text()
    smaller: Any = kprune(model, data, KPruneConfig(reduction=0.4), progress=False)
    assert type(smaller) is type(model)
    assert smaller.num_parameters() < model.num_parameters()
    assert set(smaller.config.kprune) == set(model.config.kprune)


@pytest.mark.parametrize("plugin", [True, False])
@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_self_contained_models_in_a_new_process(name: str, plugin: bool, tmp_path) -> None:
    """With the modelling file beside them and without the package, and the other way round."""
    family, auto = PRUNED[name]
    needs(family)
    script = """
import sys, torch, transformers
from safetensors.torch import load_file
source, auto, inputs, expected, plugin = sys.argv[1:]
options = {"dtype": "auto"}
if plugin == "True":
    import kprune_ext
else:
    options["trust_remote_code"] = True
torch.set_num_threads(1)
model = getattr(transformers, auto).from_pretrained(source, **options).eval()
tensors = load_file(inputs)
batch = {key: tensors[f"{key}.0"] for key in ("input_ids", "attention_mask")}
with torch.no_grad():
    logits = model(**batch).logits
wanted = load_file(expected)
for key, value in model.state_dict().items():
    assert torch.equal(value, wanted[f"state/{key}"]), key
torch.testing.assert_close(logits, wanted["logits"], rtol=3e-5, atol=3e-5)
assert ("kprune_ext" in sys.modules) == (plugin == "True")
"""
    folder = copy_of(name, tmp_path / "model")
    command = [sys.executable, "-c", script, str(folder), auto.__name__]
    command += ["batches.safetensors", f"expected/pruned/{name}.safetensors", str(plugin)]
    # Elsewhere than in the user's cache, with packages found where they are here.
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["lora", "corda"])
def test_adapters_of_a_pruned_model(name: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained("pruned/bert")
    adapted = PeftModel.from_pretrained(model, f"on_pruned/{name}")
    check = check_same if name == "lora" else check_converted
    check(
        get_peft_model_state_dict(adapted), load_file(f"on_pruned/{name}/adapter_model.safetensors")
    )
    check_outputs(adapted, text()[0], expected("on_pruned", name))


@pytest.mark.parametrize("name", ["lora", "corda"])
def test_the_module_that_an_adapter_names_has_its_model(name: str) -> None:
    """Adapters that were made without a task name the model's class and its module."""
    mapping = PeftConfig.from_pretrained(f"on_pruned/{name}").auto_mapping
    assert mapping["parent_library"] == "kprune_ext.modeling"
    parent = importlib.import_module(mapping["parent_library"])
    kind = getattr(parent, mapping["base_model_class"])
    model = AutoModelForSequenceClassification.from_pretrained("pruned/bert")
    assert type(model) is kind
    # Newer versions of PEFT import only what they are told to.
    known = inspect.signature(AutoPeftModel.from_pretrained).parameters
    options = {"import_allowlist": ["kprune_ext"]} if "import_allowlist" in known else {}
    adapted = AutoPeftModel.from_pretrained(f"on_pruned/{name}", **options)
    check_outputs(adapted, text()[0], expected("on_pruned", name))


def test_the_plugin_is_the_one_that_is_tested() -> None:
    """The Auto classes know the pruned model types, under the names that configs have."""
    for name, (family, _) in PRUNED.items():
        needs(family)
        written = read_json(f"pruned/{name}/config.json")["model_type"]
        config = AutoConfig.from_pretrained(f"pruned/{name}")
        assert config.model_type == written == f"kprune_ext_{family}"
        assert type(config).__module__.partition(".")[0] == kprune_ext.__name__
