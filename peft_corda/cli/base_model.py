"""The base model that the options name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from kprune_ext.common.command_line import PEFT_TASKS, TASKS

if TYPE_CHECKING:
    from .options import ModelOptions

PEFT_TYPES = {name: peft_type for peft_type, name in PEFT_TASKS.items()}


def load_model(options: ModelOptions) -> nn.Module:
    """The base model, in evaluation mode, where the options want it."""
    auto_class = getattr(transformers, TASKS[options.task])
    placed: dict[str, Any] = {"device_map": options.device_map} if options.device_map else {}
    model = auto_class.from_pretrained(
        options.model, dtype=dtype_of(options.dtype), **model_source(options), **placed
    )
    if options.gguf_file is not None and hasattr(model, "hf_quantizer"):
        # The weights were expanded on loading, but the model is still marked as quantised.
        model.hf_quantizer.remove_quantization_config(model)
    if options.device_map is None:
        model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval()


def model_source(options: ModelOptions) -> dict[str, Any]:
    source: dict[str, Any] = {
        "revision": options.revision,
        "gguf_file": options.gguf_file,
        "trust_remote_code": options.trust_remote_code,
    }
    return {key: value for key, value in source.items() if value is not None}


def dtype_of(name: str) -> str | torch.dtype:
    return name if name == "auto" else getattr(torch, name)


def check_options(options: ModelOptions) -> None:
    """Raise ValueError where options of the model or the data are out of range or exclude each other."""
    for name in ("num_samples", "max_length", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}.")
    if options.device is not None and options.device_map is not None:
        raise ValueError("Give either device or device_map, not both.")
    if options.pack and options.target_field is not None:
        raise ValueError("pack is for models that read one text; leave out pack or target_field.")
