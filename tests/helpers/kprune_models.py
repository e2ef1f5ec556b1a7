"""A tiny random model of every family and task that kprune_ext supports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from kprune_ext.architectures.table import ARCHITECTURES
from tests.helpers.kprune import VOCABULARY, padded, sequences

HIDDEN, HEADS, LAYERS = 24, 4, 2

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_IMAGE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 4,
}
_POSITIONS: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}

#: By name of a test case: the model type, its config, and the option for the number of neurons.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    name: (name, _TEXT, "intermediate_size")
    for name in ("bert", "roberta", "xlm-roberta", "camembert", "mpnet")
} | {
    "electra": ("electra", _TEXT | {"embedding_size": 16}, "intermediate_size"),
    "distilbert": (
        "distilbert",
        {"vocab_size": VOCABULARY, "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS},
        "hidden_dim",
    ),
    "deberta-v2": ("deberta-v2", _TEXT | _POSITIONS | {"share_att_key": True}, "intermediate_size"),
    "deberta-v2 own position projections": (
        "deberta-v2",
        _TEXT | _POSITIONS | {"share_att_key": False},
        "intermediate_size",
    ),
    "modernbert": (
        "modernbert",
        _TEXT
        | {
            "local_attention": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        "intermediate_size",
    ),
    "vit": ("vit", _IMAGE, "intermediate_size"),
    "dinov2": ("dinov2", _IMAGE | {"layerscale_value": 0.7}, "mlp_ratio"),
    "dinov2 swiglu": (
        "dinov2",
        _IMAGE | {"layerscale_value": 0.7, "use_swiglu_ffn": True},
        "mlp_ratio",
    ),
}
IMAGE_FAMILIES = frozenset({"vit", "dinov2", "dinov2 swiglu"})
TEXT_TASKS = {
    "sequence": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "answers": AutoModelForQuestionAnswering,
    "masked": AutoModelForMaskedLM,
    "embeddings": AutoModel,
}
IMAGE_TASKS = {"images": AutoModelForImageClassification, "embeddings": AutoModel}


def is_available(family: str) -> bool:
    """Whether the installed transformers is one that this family is supported with."""
    return all(row.is_available for row in ARCHITECTURES if row.model_type == FAMILIES[family][0])


#: Every family that is available, with every task it has.
CASES = [
    (family, task)
    for family in FAMILIES
    if is_available(family)
    for task in (IMAGE_TASKS if family in IMAGE_FAMILIES else TEXT_TASKS)
]


def auto_class(task: str) -> Any:
    return (TEXT_TASKS | IMAGE_TASKS)[task]


def tiny(
    family: str,
    task: str | None = None,
    *,
    neurons: int = 48,
    labels: int = 3,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> PreTrainedModel:
    """A random model whose weights are large enough to make units differ.

    By default it has the family's classification head.
    """
    if not is_available(family):
        pytest.skip(f"{family} needs a newer transformers")
    kind, settings, size = FAMILIES[family]
    width = neurons // HIDDEN if size == "mlp_ratio" else neurons
    labels = 2 if task == "answers" else labels  # start and end
    settings = settings | {size: width, "num_labels": labels} | options
    if attention is not None:
        settings = settings | {"attn_implementation": attention}
    task = task or ("images" if family in IMAGE_FAMILIES else "sequence")
    torch.manual_seed(0)
    model = auto_class(task).from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def batches_for(family: str, count: int = 24, *, seed: int = 1) -> list[dict[str, Tensor]]:
    """Calibration batches of random text or images."""
    if family not in IMAGE_FAMILIES:
        return padded([ids.clamp(min=3) for ids in sequences(count, seed=seed)])
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    return [{"pixel_values": part} for part in pixels.split(8)]


def outputs_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """All tensors that the model gives for a batch."""
    with torch.no_grad():
        return [value for value in model(**batch).values() if isinstance(value, Tensor)]
