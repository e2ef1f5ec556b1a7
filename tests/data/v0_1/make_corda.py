"""Factors, adapters, an exported adapter, and calibrations that were cut off."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from make_inputs import BATCHES, corda_config, expect, load_base, outputs_of, train, write_json
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from peft_corda import CordaFactors, calibrate, export_lora, report


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
