"""Files that version 0.1 wrote are read by the present code, to what the old code made of them.

The files, and the script that wrote them, are in `tests/data/v0_1`. Only public names are used here.
Tensors that are loaded must be the very same; what is computed from them may differ by as much as two
kinds of processor do.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import compare_versions
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

import kprune_ext
from kprune_ext import KPruneConfig, KPruneReport, LatencyTable, kprune, load_report
from kprune_ext.architectures import ARCHITECTURES
from peft_corda import (
    CordaConfig,
    CordaFactors,
    allocate_ranks,
    calibrate,
    export_lora,
    initialize_corda,
    report,
)

DATA = Path(__file__).parents[1] / "data" / "v0_1"
BASES = {
    "llama": AutoModelForCausalLM,
    "llama-3-layers": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "bert": AutoModelForSequenceClassification,
}
FACTORS = [
    f"{methods}-{weighting}"
    for methods in ("kpm", "ipm", "both")
    for weighting in ("covariance", "sqrt_covariance")
]
#: Base of each adapter.
ADAPTERS = {
    "llama": "llama",
    "llama-bfloat16": "llama",
    "llama-uncalibrated": "llama",
    "llama-modules-to-save": "llama",
    "gpt2": "gpt2",
    "bert": "bert",
    "bert-biases": "bert",
}
#: By checkpoint: `max_memory` of the calibration, finished passes, and batches still to be run.
CHECKPOINTS: dict[str, tuple[str | None, int, int]] = {
    "one-pass": (None, 0, 2),
    "passes": ("20KB", 2, 3),
    "passes-from-the-start": ("6KB", 1, 1 + 4 * 4),
}
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
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _in_the_folder(monkeypatch) -> None:
    """Adapters note the path of their base as seen from there."""
    monkeypatch.chdir(DATA)


def batches(*keys: str) -> list[Batch]:
    tensors = load_file(DATA / "batches.safetensors")
    return [{key: tensors[f"{key}.{number}"] for key in keys} for number in range(4)]


def text() -> list[Batch]:
    return batches("input_ids", "attention_mask")


def images() -> list[Batch]:
    return batches("pixel_values")


def expected(kind: str, name: str) -> dict[str, Tensor]:
    return load_file(DATA / "expected" / kind / f"{name}.safetensors")


def read_json(path: str) -> Any:
    return json.loads((DATA / path).read_text(encoding="utf-8"))


def load_base(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return BASES[name].from_pretrained(f"bases/{name}", dtype=dtype).eval()


def outputs_of(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return {key: value for key, value in model(**batch).items() if torch.is_tensor(value)}


def check_same(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same tensors to the bit."""
    assert sorted(actual) == sorted(wanted)
    for key, value in wanted.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


def check_outputs(model: torch.nn.Module, batch: Batch, wanted: dict[str, Tensor]) -> None:
    """The same numbers, but for how a processor sums."""
    found = outputs_of(model.eval(), batch)
    assert wanted
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        near = 3e-5 if value.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found[key], value, rtol=near, atol=near)


def check_numbers(actual: Any, wanted: Any, rel: float = 1e-4) -> None:
    """Two structures of JSON, with the same names and nearly the same numbers."""
    if isinstance(wanted, dict):
        # There may be more by now.
        assert wanted.keys() <= actual.keys()
        for key, value in wanted.items():
            check_numbers(actual[key], value, rel)
    elif isinstance(wanted, list):
        assert len(actual) == len(wanted)
        for one, other in zip(actual, wanted, strict=True):
            check_numbers(one, other, rel)
    elif isinstance(wanted, float):
        assert actual == pytest.approx(wanted, rel=rel)
    else:
        assert actual == wanted


def run_program(package: str, arguments: list[str]) -> None:
    """What a console program does: `main` of `cli`, or of `cli.main` if that is a package."""
    main = importlib.import_module(f"{package}.cli").main
    (main if callable(main) else main.main)(arguments)


# Factors


def directions_of(factors: CordaFactors) -> dict[str, Tensor]:
    found = {}
    for name, module in factors.modules.items():
        found[f"{name}/weight_sample"] = module.weight_sample
        for method, own in module.directions.items():
            for part in ("U", "S", "weight_norms"):
                found[f"{name}/{method}/{part}"] = getattr(own, part)
    return found


def load_factors(name: str) -> CordaFactors:
    return CordaFactors.load(f"factors/{name}.safetensors")


@pytest.mark.parametrize("name", FACTORS)
def test_factors_are_the_same_to_the_bit(name: str) -> None:
    factors = load_factors(name)
    wanted = {k: v for k, v in expected("factors", name).items() if not k.startswith("start/")}
    check_same(directions_of(factors), wanted)


@pytest.mark.parametrize("name", FACTORS)
def test_what_factors_tell_about_themselves(name: str) -> None:
    factors, about = load_factors(name), read_json("expected/factors.json")[name]
    assert list(factors.methods) == about["methods"]
    assert (factors.damping, factors.weighting) == (about["damping"], about["weighting"])
    assert factors.tokens == about["tokens"]
    assert list(factors.modules) == list(about["modules"])
    for key, wanted in about["modules"].items():
        own = factors.modules[key]
        assert list(own.shape) == wanted["shape"]
        for number in ("energy", "effective_rank", "tokens"):
            assert getattr(own, number) == wanted[number]
        assert {kind: factors.rank(key, kind) for kind in own.directions} == wanted["ranks"]


@pytest.mark.parametrize("name", FACTORS)
def test_reports_on_factors(name: str) -> None:
    reports = read_json("expected/factors.json")[name]["reports"]
    for method, wanted in reports.items():
        check_numbers(report(load_factors(name), method=method).to_dict(), wanted)


@pytest.mark.parametrize("given", ["file", "object"])
@pytest.mark.parametrize("name", FACTORS)
def test_adapters_start_from_factors(name: str, given: str) -> None:
    factors = f"factors/{name}.safetensors" if given == "file" else load_factors(name)
    config = CordaConfig(
        r=4,
        lora_alpha=4,
        corda_method="ipm" if name.startswith("ipm") else "kpm",
        corda_weighting=name.partition("-")[2],
        rank_pattern={"k_proj": 2},
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        corda_factors=factors,
    )
    model, batch = load_base("llama"), text()[0]
    before = outputs_of(model, batch)["logits"]
    adapted = get_peft_model(model, config).eval()
    assert torch.equal(outputs_of(adapted, batch)["logits"], before)
    wanted = {
        key.removeprefix("start/"): value
        for key, value in expected("factors", name).items()
        if key.startswith("start/")
    }
    state = adapted.state_dict()
    assert len(wanted) == 2 * 14
    for key, value in wanted.items():
        near = 1e-4 * float(value.abs().max())
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=near)


def test_ranks_are_allocated_from_factors() -> None:
    factors = load_factors("both-covariance")
    ranks = allocate_ranks(factors, mean_rank=2, method="ipm")
    assert set(ranks) <= set(factors.modules) and max(ranks.values()) <= 4


def test_factors_are_saved_to_a_file_like_the_old_one(tmp_path) -> None:
    load_factors("both-covariance").save(tmp_path / "again.safetensors")
    check_same(
        load_file(tmp_path / "again.safetensors"), load_file("factors/both-covariance.safetensors")
    )


# Adapters


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_the_same_to_the_bit(name: str) -> None:
    if name.endswith("biases") and compare_versions("peft", "<", "0.21"):
        pytest.skip("PEFT names trained biases in another way since 0.21")
    half = name.endswith("bfloat16")
    model = load_base(ADAPTERS[name], torch.bfloat16 if half else torch.float32)
    adapted = PeftModel.from_pretrained(model, f"adapters/{name}", autocast_adapter_dtype=not half)
    assert type(adapted.peft_config["default"]) is CordaConfig
    check_same(
        get_peft_model_state_dict(adapted), load_file(f"adapters/{name}/adapter_model.safetensors")
    )
    check_outputs(adapted, text()[0], expected("adapters", name))


@pytest.mark.parametrize("name", ADAPTERS)
def test_options_of_adapters(name: str) -> None:
    config = PeftConfig.from_pretrained(f"adapters/{name}")
    assert type(config) is CordaConfig and config.peft_type == "CORDA"
    written = read_json(f"adapters/{name}/adapter_config.json")
    ours = [key for key in written if key.startswith("corda_") and key != "corda_config"]
    assert len(ours) == 5
    for key in (*ours, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias"):
        assert getattr(config, key) == written[key], key


def test_an_adapter_is_trained_on_and_merged() -> None:
    adapted = PeftModel.from_pretrained(load_base("llama"), "adapters/llama", is_trainable=True)
    batch = text()[0]
    adapted.train()(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 14 and all(p.grad is not None for p in trained)
    merged = adapted.eval().merge_and_unload()
    check_outputs(merged, batch, expected("adapters", "llama"))


def test_an_adapter_without_a_start_is_given_one_now() -> None:
    model = PeftModel.from_pretrained(
        load_base("llama"), "adapters/llama-uncalibrated", is_trainable=True
    )
    initialize_corda(model, text(), verbose=False)
    base = outputs_of(load_base("llama"), text()[0])["logits"]
    assert torch.equal(outputs_of(model.eval(), text()[0])["logits"], base)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_saved_again_an_adapter_keeps_its_tensors_and_one_section_of_its_card(
    name: str, tmp_path
) -> None:
    shutil.copytree(f"adapters/{name}", tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(load_base(name), f"adapters/{name}")
    adapted.save_pretrained(tmp_path / "adapter")
    check_same(
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
        load_file(f"adapters/{name}/adapter_model.safetensors"),
    )
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert card.count("<!-- peft_corda: start -->") == 1


def test_an_exported_adapter() -> None:
    lora = PeftModel.from_pretrained(load_base("llama"), "exported/llama")
    assert type(lora.peft_config["default"]) is LoraConfig
    check_same(
        get_peft_model_state_dict(lora), load_file("exported/llama/adapter_model.safetensors")
    )
    check_outputs(lora, text()[0], expected("adapters", "llama"))


def test_an_old_adapter_is_exported_as_it_was_then(tmp_path) -> None:
    """The exact export only scales and stacks, so it gives the same bits everywhere."""
    export_lora("adapters/llama", tmp_path / "lora")
    check_same(
        load_file(tmp_path / "lora" / "adapter_model.safetensors"),
        load_file("exported/llama/adapter_model.safetensors"),
    )


def test_an_old_export_is_replaced_or_left_alone(tmp_path) -> None:
    """Version 0.1 put no mark of its own into the file of weights, so it may be refused as foreign."""
    folder = tmp_path / "lora"
    shutil.copytree("exported/llama", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    try:
        export_lora("adapters/llama", folder, rank=3)
    except ValueError as error:
        assert "Give the path of a new folder" in str(error)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    else:
        lora = PeftConfig.from_pretrained(str(folder))
        assert type(lora) is LoraConfig and lora.r == 3


# Calibrations that were cut off


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_interrupted_calibration_goes_on(name: str, tmp_path) -> None:
    max_memory, finished, left = CHECKPOINTS[name]
    folder = tmp_path / "checkpoint"
    shutil.copytree(f"checkpoints/{name}", folder)
    done: dict[str, Tensor] = {}
    for path in sorted(folder.glob("pass-*.safetensors")):
        done |= directions_of(CordaFactors.load(path))
    model, seen = load_base("llama-3-layers"), []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 1:  # others find out the layout
            seen.append(1)

    model.model.register_forward_pre_hook(see, with_kwargs=True)
    config = CordaConfig(
        r=4,
        lora_alpha=4,
        corda_method="kpm",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    factors = calibrate(
        model,
        config,
        text(),
        max_memory,
        checkpoint_dir=folder,
        checkpoint_seconds=0,
        verbose=False,
    )
    # Passes that were finished, and batches that were counted, are not run again.
    assert len(seen) == left
    found, wanted = directions_of(factors), expected("checkpoints", name)
    assert found.keys() == wanted.keys()
    assert bool(done) == (finished > 0)
    for key, value in done.items():
        assert torch.equal(found[key], value) and torch.equal(wanted[key], value), key
    for key, value in wanted.items():
        if not key.endswith("/U"):
            near = 1e-3 * float(value.abs().max())
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=near)
        else:  # vectors may point either way
            lengths = (found[key] * value).sum(0).abs()
            torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-3)
    assert not list(folder.glob("sums-*"))


# Pruned models


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


# Adapters of pruned models


@pytest.mark.parametrize("name", ["lora", "corda"])
def test_adapters_of_a_pruned_model(name: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained("pruned/bert")
    adapted = PeftModel.from_pretrained(model, f"on_pruned/{name}")
    check_same(
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


# Smaller files


def test_latency_table() -> None:
    table = LatencyTable.load("json/latency.json")
    assert table == LatencyTable(
        device="cpu",
        batch_size=4,
        sequence_length=12,
        heads={0: 1e-5, 2: 3e-5, 4: 4.5e-5},
        neurons={0: 5e-6, 8: 1e-5, 16: 2.5e-5, 32: 3e-5},
    )
    assert table.costs("attention", 4)[1] == pytest.approx(2e-5)
    config = KPruneConfig(reduction=0.5, metric="latency")
    pruned: Any = kprune(load_base("bert"), text(), config, latency=table, progress=False)
    assert pruned.kprune_report.cost <= 0.5 * pruned.kprune_report.cost_before


def test_report_of_a_pruning() -> None:
    found = KPruneReport.load_json("json/kprune_report.json")
    assert found == load_report("json/kprune_report.json") == load_report("pruned/bert")
    check_numbers(found.to_dict(), read_json("json/kprune_report.json"), rel=1e-12)


def test_report_on_factors_has_what_it_had() -> None:
    found = report(load_factors("both-covariance"), method="ipm").to_dict()
    check_numbers(found, read_json("json/corda_report.json"))


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("config", KPruneConfig()),
        ("config-paper", KPruneConfig.paper(0.4, seed=7, max_state_memory="1GiB")),
    ],
)
def test_options_of_a_pruning(name: str, made: KPruneConfig) -> None:
    """Also, no default has another value by now."""
    found = KPruneConfig.from_dict(
        json.loads((DATA / "json" / f"{name}.json").read_text(encoding="utf-8"))
    )
    assert found == made
    check_numbers(found.to_dict(), read_json(f"json/{name}.json"), rel=0)


@pytest.mark.parametrize(
    ("package", "command"), [("peft_corda", "calibrate"), ("kprune_ext", "prune")]
)
def test_options_in_a_file(package: str, command: str, capsys) -> None:
    """What --print_config printed is a --config file; names and spellings may be others by now."""
    written = yaml.safe_load((DATA / "json" / f"{command}.yaml").read_text(encoding="utf-8"))
    with pytest.raises(SystemExit) as stopped:
        run_program(package, [command, f"--config=json/{command}.yaml", "--print_config"])
    assert not stopped.value.code
    found = yaml.safe_load(capsys.readouterr().out)
    assert len(found) >= len(written)
    values = list(found.values())
    for name, value in written.items():
        assert found.get(name) == value or name == "task" or value in values, name


# The console programs with old files


def test_console_programs_read_old_files(tmp_path, capsys) -> None:
    run_program(
        "peft_corda",
        ["report", "factors/both-covariance.safetensors", "--method=ipm", "--mean_rank=2"],
    )
    assert "rank_pattern" in capsys.readouterr().out
    run_program("peft_corda", ["export", "adapters/llama", str(tmp_path / "lora")])
    check_same(
        load_file(tmp_path / "lora" / "adapter_model.safetensors"),
        load_file("exported/llama/adapter_model.safetensors"),
    )
    run_program("kprune_ext", ["report", "pruned/bert", f"--json={tmp_path / 'report.json'}"])
    assert KPruneReport.load_json(tmp_path / "report.json") == load_report("pruned/bert")


def test_console_program_starts_an_adapter_from_old_factors(tmp_path) -> None:
    arguments = ["init", "--model=bases/llama", "--factors=factors/kpm-covariance.safetensors"]
    arguments += ["--r=4", "--rank_pattern={k_proj: 2}", "--device=cpu"]
    run_program("peft_corda", [*arguments, f"--output={tmp_path / 'adapter'}"])
    adapted = PeftModel.from_pretrained(load_base("llama"), tmp_path / "adapter").eval()
    state = adapted.state_dict()
    wanted = expected("factors", "kpm-covariance")
    for key in (key for key in wanted if key.startswith("start/")):
        near = 1e-4 * float(wanted[key].abs().max())
        torch.testing.assert_close(
            state[key.removeprefix("start/")], wanted[key], rtol=1e-4, atol=near
        )


def test_the_plugin_is_the_one_that_is_tested() -> None:
    """The Auto classes know the pruned model types, under the names that configs have."""
    for name, (family, _) in PRUNED.items():
        needs(family)
        written = read_json(f"pruned/{name}/config.json")["model_type"]
        config = AutoConfig.from_pretrained(f"pruned/{name}")
        assert config.model_type == written == f"kprune_ext_{family}"
        assert type(config).__module__.partition(".")[0] == kprune_ext.__name__
