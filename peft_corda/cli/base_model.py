"""Loading of the base model that the options name."""

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
    """Load the base model, in evaluation mode, on the device that the options name."""
    auto_class = getattr(transformers, TASKS[options.task])
    placed: dict[str, Any] = {"device_map": options.device_map} if options.device_map else {}
    model = auto_class.from_pretrained(
        options.model, dtype=dtype_of(options.dtype), **model_source(options), **placed
    )
    if options.gguf_file is not None and hasattr(model, "hf_quantizer"):
        # Loading has dequantised the weights, but the model is still marked as quantised.
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
    """Check the options of the model and the data.

    Raises:
        ValueError: If an option is out of range, or if two options exclude each other.
    """
    for name in ("num_samples", "max_length", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}.")
    if options.device is not None and options.device_map is not None:
        raise ValueError("Give either device or device_map, not both.")
    if options.pack and options.target_field is not None:
        raise ValueError(
            "pack is only for models that read one text. Leave out pack or target_field."
        )


def check_sources(options: ModelOptions, method: str, **others: str | None) -> None:
    """Check that there is one thing to calibrate on, with text to keep where the method needs it.

    Args:
        options: The options.
        method: Method of the calibration.
        others: What may be given in place of both data and covariances, by name.

    Raises:
        ValueError: If there is none or more, or what is given does not go together.
    """
    what = {
        "data (text to calibrate on)": options.data,
        "covariances (a file written by kprune prune)": options.covariances,
        **{f"{name} (a file written by peft-corda calibrate)": own for name, own in others.items()},
    }
    if sum(value is not None for value in what.values()) != 1:
        raise ValueError(f"Give exactly one of {', '.join(what)}.")
    if options.covariances is not None:
        _check_with_covariances(options, method)
    elif options.data is not None:
        _check_keep(options, method)
    elif options.keep is not None:
        raise ValueError(
            f"keep is for a calibration, and {', '.join(others)} are of one that is done. Leave it out."
        )


def _check_with_covariances(options: ModelOptions, method: str) -> None:
    wrong = [
        name
        for name in ("keep", "max_memory", "checkpoint_dir")
        if getattr(options, name) is not None
    ]
    if wrong:
        raise ValueError(
            f"{' and '.join(wrong)} cannot be combined with covariances, which need no pass over data. "
            "Leave it out, or give data in place of covariances."
        )
    if method == "sc_lora":
        raise ValueError(
            "sc_lora compares two texts, and covariances are of one. Give data and keep in their place, "
            "or choose another corda_method."
        )


def _check_keep(options: ModelOptions, method: str) -> None:
    if method == "sc_lora" and options.keep is None:
        raise ValueError(
            "sc_lora needs the text of the task as data and the text of the knowledge to keep as keep, "
            "and keep is missing."
        )
    if method != "sc_lora" and options.keep is not None:
        raise ValueError(
            f"keep={options.keep!r} is for corda_method=sc_lora, which has two texts. {method} has one: "
            "give it as data."
        )
