"""What the study of fine-tuning compares: what is trained, from which start, with which decay."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_corda import CordaConfig, calibrate, forgetting, knowledge_decay

from ..common.models import load_model
from .finetune_data import Corpora

LORA = (5e-4, 1e-3, 2e-3, 4e-3)
LOW = (1e-4, 2e-4, 5e-4, 1e-3)
#: What PEFT's `init_lora_weights` is called; all other starts but `full` are CorDA's.
PEFT_STARTS: Mapping[str, Any] = {"lora": True, "pissa": "pissa_niter_16"}
#: The texts of each start: those to keep, or those of the task.
CALIBRATED_ON = {"kpm": "kpm", "ipm": "ipm", "sc_lora": "ipm", "lora_null": "kpm"}


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        start: How the adapter starts: one of `PEFT_STARTS`, a `corda_method`, or `"full"` for none.
        rates: Learning rates of its sweep.
        options: Further options of `CordaConfig`.
        decay: AdamW's weight decay, or `knowledge_decay` on the texts to keep.
        strengths: Strengths of the decay to sweep. Weight decay takes away `strength` times the sum of
            the learning rates: in a short run, as much as a longer one with a smaller strength.
    """

    start: str
    rates: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    decay: Literal["weight", "knowledge"] | None = None
    strengths: tuple[float, ...] = (0.0,)


WEIGHT, KNOWLEDGE = (0.3, 3.0, 10.0), (10.0, 30.0, 100.0)
ARMS: Mapping[str, Arm] = {
    "lora": Arm("lora", LORA),
    "pissa": Arm("pissa", LOW),
    "kpm": Arm("kpm", LORA),
    "ipm": Arm("ipm", LOW),
    "full": Arm("full", (2e-5, 5e-5, 1e-4)),
    "kpm-paper": Arm("kpm", (1e-4, 2e-4, 5e-4), {"corda_scaling": "paper"}),
    "ipm-paper": Arm("ipm", (5e-5, 1e-4, 2e-4), {"corda_scaling": "paper"}),
    "kpm-sqrt": Arm("kpm", LORA, {"corda_weighting": "sqrt_covariance"}),
    "ipm-sqrt": Arm("ipm", LOW, {"corda_weighting": "sqrt_covariance"}),
    "sc_lora": Arm("sc_lora", LOW),
    "lora_null": Arm("lora_null", LORA),
    "lora+decay": Arm("lora", LORA, decay="weight", strengths=WEIGHT),
    "kpm+decay": Arm("kpm", LORA, decay="weight", strengths=WEIGHT),
    "ipm+decay": Arm("ipm", LOW, decay="weight", strengths=WEIGHT),
    "full+decay": Arm("full", (5e-5, 1e-4), decay="weight", strengths=WEIGHT),
    "lora+knowledge": Arm("lora", LORA, decay="knowledge", strengths=KNOWLEDGE),
    "kpm+knowledge": Arm("kpm", LORA, decay="knowledge", strengths=KNOWLEDGE),
    "ipm+knowledge": Arm("ipm", LOW, decay="knowledge", strengths=KNOWLEDGE),
}


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that was asked for; by default an accelerator, if there is one."""
    if args.device is not None:
        return torch.device(args.device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def fresh_model(args: argparse.Namespace) -> nn.Module:
    """The model before training."""
    model = load_model(args.model, getattr(torch, args.settings.dtype))
    model.set_attn_implementation(args.settings.attention)
    return model.to(device_of(args))


def adapted(arm: Arm, corpora: Corpora, args: argparse.Namespace) -> nn.Module:
    """A fresh model with its adapter, ready to be trained."""
    model = fresh_model(args)
    if arm.start == "full":
        return model
    common = _common(args)
    if arm.start in PEFT_STARTS:
        init: Any = PEFT_STARTS[arm.start]
        return get_peft_model(model, LoraConfig(init_lora_weights=init, **common))
    config = CordaConfig(
        corda_method=arm.start,
        corda_factors=factors_of(arm, corpora, args),
        **arm.options,
        **common,
    )
    return get_peft_model(model, config)


def _common(args: argparse.Namespace) -> dict[str, Any]:
    rank = args.settings.rank
    return {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }


def factors_of(arm: Arm, corpora: Corpora, args: argparse.Namespace) -> str:
    """The file of an arm's factors, which is made by its first run."""
    weighting = arm.options.get("corda_weighting", "covariance")
    name = f"{arm.start}{'-sqrt' * (weighting != 'covariance')}"
    path: Path = args.factors / f"{args.settings.task}-{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        config = CordaConfig(corda_method=arm.start, corda_weighting=weighting, **_common(args))
        keep = {"keep": corpora.calibration["kpm"]} if arm.start == "sc_lora" else {}
        data = corpora.calibration[CALIBRATED_ON[arm.start]]
        calibrate(fresh_model(args), config, data, max_memory="8GiB", **keep).save(path)
    return str(path)


def knowledge_factors(corpora: Corpora, args: argparse.Namespace) -> str:
    """The file of the factors on the texts to keep, by whose sketches forgetting is predicted."""
    return factors_of(ARMS["kpm"], corpora, args)


def predicted_forgetting(
    arm: Arm, model: nn.Module, corpora: Corpora, args: argparse.Namespace
) -> float | None:
    """`F` on the texts to keep; None where more than an adapter beside the base is changed."""
    if arm.start in ("full", "pissa"):
        return None
    return forgetting(model, knowledge_factors(corpora, args)).value


def optimizer_of(
    arm: Arm, model: nn.Module, rate: float, strength: float, factors: str | None
) -> torch.optim.Optimizer:
    """AdamW with the arm's decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = strength if arm.decay == "weight" else 0.0
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    if arm.decay == "knowledge" and factors is not None:
        knowledge_decay(optimizer, model, factors, strength)
    return optimizer
