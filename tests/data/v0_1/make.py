"""Writes the files beside this script: what version 0.1 of both packages left on disk.

They were made once, with commit 23278c2 on the path, and are not to be made anew: the tests in
`tests/compatibility` are about files of the past. From a checkout of that commit in `OLD` (a full path):

    cd OLD && PYTHONPATH=OLD HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python \\
        THIS_REPOSITORY/tests/data/v0_1/make.py THIS_REPOSITORY/tests/data/v0_1

Nothing but public names is used, and the console programs' own tables of options. What is written:

    batches.safetensors     the inputs of all models: calibration batches of text, and images
    bases/NAME              tiny random models, so that no test depends on how weights are drawn
    factors/NAME            CordaFactors.save, by method and weighting
    adapters/NAME           save_pretrained of trained CORDA adapters
    exported/NAME           export_lora of one of them
    checkpoints/NAME        folders of calibrations that were cut off
    pruned/NAME             save_pretrained of pruned models; code beside them is called .py.txt
    on_pruned/NAME          adapters of pruned models, without a task: PEFT notes the model's module
    json/NAME               a latency table, reports, options, configs of both console programs
    names.json              public names, and all options of the console programs
    expected/KIND/NAME      what the old code computed from the above

"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import shutil
import sys
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import kprune_ext
import peft_corda
from kprune_ext import KPruneConfig, LatencyTable, kprune, load_report
from peft_corda import CordaConfig, CordaFactors, calibrate, export_lora, report

VOCABULARY, HIDDEN, HEADS, LAYERS, NEURONS = 64, 16, 4, 2, 32
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LABELS = {"num_labels": 3}
#: By name: the Auto class, the model type and its options.
BASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "llama": (AutoModelForCausalLM, "llama", TEXT | {"num_key_value_heads": 2}),
    "llama-3-layers": (
        AutoModelForCausalLM,
        "llama",
        TEXT | {"num_key_value_heads": 2, "num_hidden_layers": 3},
    ),
    "gpt2": (
        AutoModelForCausalLM,
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 32,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": NEURONS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bert": (AutoModelForSequenceClassification, "bert", TEXT | LABELS),
    "distilbert": (
        AutoModelForSequenceClassification,
        "distilbert",
        {
            "vocab_size": VOCABULARY,
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": NEURONS,
            "max_position_embeddings": 32,
        }
        | LABELS,
    ),
    "modernbert": (
        AutoModelForMaskedLM,
        "modernbert",
        TEXT | {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "deberta-v2": (
        AutoModelForSequenceClassification,
        "deberta-v2",
        TEXT
        | LABELS
        | {
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
            "share_att_key": True,
        },
    ),
    "mpnet": (AutoModel, "mpnet", TEXT),
    "vit": (
        AutoModelForImageClassification,
        "vit",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": NEURONS,
            "image_size": 8,
            "patch_size": 4,
        }
        | LABELS,
    ),
}
#: Those that adapters are trained on; of the others only what is pruned of them is kept.
KEPT_BASES = ("llama", "llama-3-layers", "gpt2", "bert")
Batch = dict[str, Tensor]


def make_model(name: str) -> PreTrainedModel:
    """A random model whose weights are large enough to make units differ."""
    auto, kind, options = BASES[name]
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def make_batches() -> list[Batch]:
    """Four batches of text, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(4):
        ids = torch.randint(3, VOCABULARY, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(4):
            mask[row, 12 - (row + number) % 4 :] = 0
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def make_images() -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [{"pixel_values": torch.randn(4, 3, 8, 8, generator=generator)} for _ in range(4)]


BATCHES, IMAGES = make_batches(), make_images()


def tensors_of(output: Any) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in output.items() if torch.is_tensor(value)}


def outputs_of(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return tensors_of(model.eval()(**batch))


def expect(kind: str, name: str, tensors: dict[str, Tensor]) -> None:
    path = Path("expected", kind, f"{name}.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().clone() for key, value in tensors.items()}, path)


def write_json(path: str, value: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def load_base(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """From its folder here, whose name adapters note."""
    return BASES[name][0].from_pretrained(f"bases/{name}", dtype=dtype).eval()


def corda_config(name: str, **options: Any) -> CordaConfig:
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    defaults = {
        "r": 4,
        "lora_alpha": 4,
        "corda_method": "kpm",
        "target_modules": "all-linear",
        "task_type": task,
    }
    return CordaConfig(**(defaults | options))


def write_bases() -> None:
    both = {
        f"{key}.{number}": value
        for batches in (BATCHES, IMAGES)
        for number, batch in enumerate(batches)
        for key, value in batch.items()
    }
    save_file(both, "batches.safetensors")
    for name in KEPT_BASES:
        make_model(name).save_pretrained(f"bases/{name}")


def directions_of(factors: CordaFactors) -> dict[str, Tensor]:
    """All tensors of factors, by module, method and part."""
    found = {}
    for name, module in factors.modules.items():
        found[f"{name}/weight_sample"] = module.weight_sample
        for method, own in module.directions.items():
            for part in ("U", "S", "weight_norms"):
                found[f"{name}/{method}/{part}"] = getattr(own, part)
    return found


def write_factors() -> None:
    about = {}
    for weighting in ("covariance", "sqrt_covariance"):
        for name, methods in (("kpm", ["kpm"]), ("ipm", ["ipm"]), ("both", ["kpm", "ipm"])):
            config = corda_config(
                "llama",
                corda_method=methods[0],
                corda_weighting=weighting,
                corda_damping=0.02,
                rank_pattern={"k_proj": 2},
            )
            model = load_base("llama")
            factors = calibrate(model, config, BATCHES, methods=methods, verbose=False)
            label = f"{name}-{weighting}"
            Path("factors").mkdir(exist_ok=True)
            factors.save(f"factors/{label}.safetensors")
            expected = directions_of(factors)
            # And where adapters start from them.
            adapted = get_peft_model(model, config)
            expected |= {
                f"start/{key}": value
                for key, value in adapted.state_dict().items()
                if ".lora_A.default" in key or ".lora_B.default" in key
            }
            expect("factors", label, expected)
            about[label] = {
                "methods": list(factors.methods),
                "damping": factors.damping,
                "weighting": factors.weighting,
                "tokens": factors.tokens,
                "modules": {
                    key: {
                        "shape": list(own.shape),
                        "energy": own.energy,
                        "effective_rank": own.effective_rank,
                        "tokens": own.tokens,
                        "ranks": {kind: factors.rank(key, kind) for kind in own.directions},
                    }
                    for key, own in factors.modules.items()
                },
                "reports": {kind: report(factors, method=kind).to_dict() for kind in methods},
            }
    write_json("expected/factors.json", about)


#: By name: the base, its dtype, whether it was calibrated, and options of the config.
ADAPTERS: dict[str, tuple[str, torch.dtype, bool, dict[str, Any]]] = {
    "llama": ("llama", torch.float32, True, {}),
    "llama-bfloat16": ("llama", torch.bfloat16, True, {"corda_method": "ipm"}),
    "llama-uncalibrated": ("llama", torch.float32, False, {"corda_method": None}),
    "llama-modules-to-save": (
        "llama",
        torch.float32,
        True,
        {
            "corda_method": "ipm",
            "corda_scaling": "paper",
            "corda_weighting": "sqrt_covariance",
            "modules_to_save": ["lm_head"],
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
            "alpha_pattern": {"q_proj": 3},
            "use_rslora": True,
            "lora_dropout": 0.1,
        },
    ),
    "gpt2": ("gpt2", torch.float32, True, {"corda_method": "ipm", "lora_alpha": 8}),
    "bert": ("bert", torch.float32, True, {"corda_scaling": "paper"}),
    "bert-biases": ("bert", torch.float32, True, {"bias": "lora_only"}),
}


def train(model: torch.nn.Module, batch: Batch, steps: int = 2) -> None:
    torch.manual_seed(3)
    ids = batch["input_ids"]
    labels = ids[:, 0] % 3 if outputs_of(model, batch)["logits"].ndim == 2 else ids
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def write_adapters() -> None:
    for label, (base, dtype, calibrated, options) in ADAPTERS.items():
        config = corda_config(base, **options)
        model = load_base(base, dtype)
        if calibrated:
            calibrate(model, config, BATCHES, verbose=False)
        torch.manual_seed(4)  # for an adapter that starts as a LoRA
        # The bfloat16 one is kept in bfloat16, which is not PEFT's default.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
        train(adapted, BATCHES[1])
        adapted.save_pretrained(f"adapters/{label}")
        expect("adapters", label, outputs_of(adapted, BATCHES[0]))
    export_lora("adapters/llama", "exported/llama")


class PowerCut(Exception):
    """Ends a calibration."""


def cut_off(label: str, in_pass: int, at: int, max_memory: str | None) -> None:
    """Run a calibration until the batch `at` of a pass, where the model fails."""
    seen = []

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        # Finding out the layout takes runs as well, of one sequence.
        if len(kwargs["input_ids"]) > 1:
            seen.append(1)
            if len(seen) == in_pass * len(BATCHES) + at + 1:
                raise PowerCut

    def start(model: PreTrainedModel, **options: Any) -> CordaFactors:
        config = corda_config("llama")
        return calibrate(model, config, BATCHES, max_memory, verbose=False, **options)

    model: Any = load_base("llama-3-layers")
    model.model.register_forward_pre_hook(fail, with_kwargs=True)
    with contextlib.suppress(PowerCut):
        start(model, checkpoint_dir=f"checkpoints/{label}", checkpoint_seconds=0)
        raise SystemExit(f"{label} was not cut off")
    expect("checkpoints", label, directions_of(start(load_base("llama-3-layers"))))


def write_checkpoints() -> None:
    cut_off("one-pass", 0, 2, None)
    cut_off("passes", 2, 1, "20KB")  # hidden states carried from pass to pass
    cut_off("passes-from-the-start", 1, 3, "6KB")


#: By name: the base, its dtype, how it is pruned and how it is saved.
PRUNED: dict[str, tuple[str, torch.dtype, KPruneConfig, dict[str, Any]]] = {
    name: (name, torch.float32, KPruneConfig(reduction=0.5), {})
    for name in ("bert", "distilbert", "modernbert", "deberta-v2", "mpnet", "vit")
} | {
    "bert-self-contained": (
        "bert",
        torch.float32,
        KPruneConfig(reduction=0.6),
        {"self_contained": True},
    ),
    "bert-empty-sublayers": ("bert", torch.float32, KPruneConfig.paper(0.92), {}),
    "bert-bfloat16": ("bert", torch.bfloat16, KPruneConfig(reduction=0.5), {}),
    "bert-latency": ("bert", torch.float32, KPruneConfig(reduction=0.5, metric="latency"), {}),
    "modernbert-self-contained": (
        "modernbert",
        torch.float32,
        KPruneConfig(reduction=0.6),
        {"self_contained": True},
    ),
}
LATENCY = LatencyTable(
    device="cpu",
    batch_size=4,
    sequence_length=12,
    heads={0: 1e-5, 2: 3e-5, 4: 4.5e-5},
    neurons={0: 5e-6, 8: 1e-5, 16: 2.5e-5, 32: 3e-5},
)


def write_pruned() -> None:
    from_config = {}
    classes = {}
    for label, (base, dtype, config, options) in PRUNED.items():
        batches = IMAGES if base == "vit" else BATCHES
        latency = LATENCY if config.metric == "latency" else None
        model = make_model(base).to(dtype)
        pruned: Any = kprune(model, batches, config, latency=latency, progress=False)
        pruned.save_pretrained(f"pruned/{label}", **options)
        for path in Path("pruned", label).glob("*.py"):
            path.rename(f"{path}.txt")  # or else formatters would change it
        state = {f"state/{key}": value for key, value in pruned.state_dict().items()}
        expect("pruned", label, outputs_of(pruned, batches[0]) | state)
        classes[label] = type(pruned).__name__
        pruned.kprune_report = None
        from_config[label] = load_report(pruned, 12).to_dict()
    write_json("expected/pruned.json", {"classes": classes, "reports from config": from_config})

    for label, config in (
        ("lora", LoraConfig(r=2, target_modules=["query", "value"])),
        ("corda", CordaConfig(r=2, lora_alpha=2, target_modules=["query", "value"])),
    ):
        model = AutoModelForSequenceClassification.from_pretrained("pruned/bert")
        if isinstance(config, CordaConfig):
            calibrate(model, config, BATCHES, verbose=False)
        torch.manual_seed(5)
        adapted = get_peft_model(model, config)
        train(adapted, BATCHES[1])
        adapted.save_pretrained(f"on_pruned/{label}")
        expect("on_pruned", label, outputs_of(adapted, BATCHES[0]))


def printed(run: Callable[[list[str]], None], arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        run(arguments)
    return text.getvalue()


def write_json_files() -> None:
    folder = Path("json")
    folder.mkdir(exist_ok=True)
    LATENCY.save(folder / "latency.json")
    factors = CordaFactors.load("factors/both-covariance.safetensors")
    report(factors, method="ipm").save_json(folder / "corda_report.json")
    load_report("pruned/bert").save_json(folder / "kprune_report.json")
    (folder / "config.json").write_text(KPruneConfig().to_json() + "\n")
    paper = KPruneConfig.paper(0.4, seed=7, max_state_memory="1GiB")
    (folder / "config-paper.json").write_text(paper.to_json() + "\n")
    corda, prune = (importlib.import_module(f"{name}.cli") for name in ("peft_corda", "kprune_ext"))
    given = ["--model=org/name", "--data=texts.jsonl", "--r=8", "--rank_pattern={q_proj: 3}"]
    given += ["--target_modules=[q_proj,v_proj]", "--max_memory=4GiB", "--pack"]
    lines = printed(corda.main, ["calibrate", *given, "--output=f.safetensors", "--print_config"])
    (folder / "calibrate.yaml").write_text(lines)
    given = ["--model=org/name", "--data=texts.jsonl", "--out=pruned", "--reduction=0.6"]
    lines = printed(prune.main, ["prune", *given, "--text_field=[a,b]", "--print_config"])
    (folder / "prune.yaml").write_text(lines)


def values_for(kind: Any) -> list[str]:
    """Values that an option of a type takes on the command line."""
    choices = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is Literal:
        return [str(choice) for choice in choices]
    if origin is list:
        return ["[first, second]"]
    if origin is dict:
        return ['{"first": 3}']
    if choices:
        return [value for choice in choices for value in values_for(choice)]
    return {int: ["3"], float: ["0.25"], str: ["text"], type(None): ["null"]}[kind]


def options_of(module: Any) -> dict[str, list[dict[str, Any]]]:
    """By subcommand, every option and positional with values that it takes."""
    parsers = module.build_parser()._subcommands_action._name_parser_map
    found = {}
    for command, parser in parsers.items():
        options = module.COMMANDS[command]
        types = typing.get_type_hints(options)
        names = {field.name for field in fields(options)}
        rows = []
        for action in parser._actions:
            takes = action.dest in names and type(action).__name__ != "_StoreTrueAction"
            rows.append(
                {
                    "name": action.dest,
                    "options": list(action.option_strings),
                    "required": bool(action.required),
                    "values": values_for(types[action.dest]) if takes else [],
                }
            )
        found[command] = rows
    return found


def parameters_of(value: Any) -> list[str]:
    if not callable(value):
        return []
    inherited = {"self"}
    if value is CordaConfig:  # those of PEFT are PEFT's
        inherited |= {*inspect.signature(LoraConfig).parameters}
    return [name for name in inspect.signature(value).parameters if name not in inherited]


def members_of(value: Any) -> list[str]:
    """What our own class and its bases of ours have that does not start with an underscore."""
    if not inspect.isclass(value):
        return []
    ours = [kind for kind in value.__mro__ if kind.__module__.startswith(OURS)]
    found = {
        name for kind in ours for name in (*vars(kind), *vars(kind).get("__annotations__", ()))
    }
    return sorted(name for name in found if not name.startswith("_"))


OURS = ("peft_corda", "kprune_ext")


def write_names() -> None:
    programs = {"peft-corda": "peft_corda", "kprune": "kprune_ext"}
    modeling = importlib.import_module("kprune_ext.modeling")
    architectures = importlib.import_module("kprune_ext.architectures").ARCHITECTURES
    classes = [name for name in vars(modeling) if name.startswith("KPrune")]
    write_json(
        "names.json",
        {
            "all": {name: list(sys.modules[name].__all__) for name in OURS},
            "parameters": {
                f"{package.__name__}.{name}": parameters_of(getattr(package, name))
                for package in (peft_corda, kprune_ext)
                for name in package.__all__
            },
            "members": {
                f"{package.__name__}.{name}": members_of(getattr(package, name))
                for package in (peft_corda, kprune_ext)
                for name in package.__all__
            },
            "model types": [row.model_type for row in architectures],
            "modeling": sorted(classes),
            "programs": programs,
            "options": {
                program: options_of(importlib.import_module(f"{package}.cli"))
                for program, package in programs.items()
            },
        },
    )


def main() -> None:
    """Write everything into the folder that is given, in place of what is there but this script."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]).resolve()
    for package in (peft_corda, kprune_ext):
        if Path(str(package.__file__)).resolve().parents[1] != Path.cwd():
            sys.exit(
                f"{package.__name__} is that of {package.__file__}, not of the old commit here."
            )
    os.chdir(folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != Path(__file__).name:
            path.unlink()
    write_bases()
    write_factors()
    write_adapters()
    write_checkpoints()
    write_pruned()
    write_json_files()
    write_names()


if __name__ == "__main__":
    main()
