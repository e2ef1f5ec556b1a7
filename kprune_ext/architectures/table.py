"""Table of the model families that can be pruned, and look-up of a model's row.

To add a family, add a row to `text_encoders`, `image_encoders` or `decoders`: the paths of its
projections, and a function that runs one sub-layer (`blocks` has the common ones). Its model classes for
all tasks follow from transformers' own tables. Nothing outside of `architectures` names a family.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)

from .decoders import DECODERS
from .image_encoders import IMAGE_ENCODERS
from .refusals import refusal_of
from .row import Architecture
from .text_encoders import TEXT_ENCODERS

ARCHITECTURES: tuple[Architecture, ...] = (*TEXT_ENCODERS, *IMAGE_ENCODERS, *DECODERS)
#: Row by model type, both of the dense and of the pruned family.
ROWS = {row.pruned_type: row for row in ARCHITECTURES} | {
    row.model_type: row for row in ARCHITECTURES
}


def supported(*, encoders: bool = False) -> str:
    """Returns the model types that can be pruned, or those of encoders alone, for messages."""
    rows = (row for row in ARCHITECTURES if not (encoders and row.is_causal))
    return ", ".join(row.model_type for row in rows)


def find_architecture(model: nn.Module) -> Architecture:
    """Returns the table row of a dense or pruned model.

    Raises:
        ValueError: If the family or variant is not supported; the message lists the supported ones.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if isinstance(model, PreTrainedModel):
        for row in ARCHITECTURES:
            if kind in (row.model_type, row.pruned_type):
                _refuse(row, model)
                return row
    if is_decoder(model):
        decoders = ", ".join(row.model_type for row in DECODERS)
        reason = refusal_of(config) or (
            "it is a decoder of a family that has no row in kprune_ext/architectures/decoders.py. Add "
            "one, or prune a model of another family"
        )
        raise ValueError(
            f"Cannot prune a {type(model).__name__} (model type {kind!r}): {reason}. Supported "
            f"decoders: {decoders}. Supported encoders: {supported(encoders=True)}."
        )
    raise ValueError(
        f"Cannot prune a {type(model).__name__} (model type {kind!r}). Supported model types: "
        f"{supported()}. Unwrap the model first if it is inside another "
        "(accelerator.unwrap_model, PeftModel.merge_and_unload). To add a family, add a row with "
        "the paths of its projections to ARCHITECTURES in kprune_ext/architectures/."
    )


def is_decoder(model: nn.Module) -> bool:
    """Returns whether a model predicts each token only from the tokens before it.

    The configs of most families (Llama, Qwen, Gemma, GPT-2) do not say so. For them it follows from
    the kinds of language models that transformers lists for the config's class.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_decoder", False):
        return True
    kind = type(config)
    if kind in MODEL_FOR_MASKED_LM_MAPPING:  # such as BERT, which can be either
        return False
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)


def _refuse(row: Architecture, model: PreTrainedModel) -> None:
    if not row.is_available:
        raise ValueError(
            f"Pruning {row.model_type} models needs transformers {row.transformers} or newer, but "
            f"{transformers.__version__} is installed. Update it: pip install -U transformers"
        )
    if is_decoder(model) and not row.is_causal:
        raise ValueError(
            f"Cannot prune a {row.model_type} model as a decoder (config.is_decoder=True). Load the "
            "model with is_decoder=False."
        )
    reason = row.refusal(model.config)
    if reason is not None:
        raise ValueError(
            f"Cannot prune this {row.model_type} model: {reason}. Use a checkpoint without it."
        )
