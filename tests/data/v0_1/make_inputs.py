"""Tiny models and batches that all the files are made from, and how results are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
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

from peft_corda import CordaConfig

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
