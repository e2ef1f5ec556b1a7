"""Pruned models, and adapters of one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from make_inputs import BATCHES, IMAGES, expect, make_model, outputs_of, train, write_json
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from kprune_ext import KPruneConfig, LatencyTable, kprune, load_report
from peft_corda import CordaConfig, calibrate

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
