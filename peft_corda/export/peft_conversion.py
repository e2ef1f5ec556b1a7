"""Converts the adapter to a plain LoRA while PEFT saves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from torch import Tensor

from ..config import CordaConfig
from ..model_card import update_card
from .lora import lora_config, lora_tensors


class ConvertedConfig(LoraConfig):
    """Config that replaces PEFT's copy when `save_pretrained` converts the adapter to a LoRA."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        update_card(save_directory, None)


def convert_for_saving(
    tensors: Mapping[str, Tensor], config: CordaConfig | None
) -> dict[str, Tensor]:
    """Returns the LoRA tensors that PEFT is to write in place of the adapter's.

    Called by `PeftModel.save_pretrained(path_initial_model_for_weight_conversion=...)`.

    Args:
        tensors: Tensors of the CORDA adapter, as they would otherwise be saved.
        config: PEFT's own copy of the adapter's config, which is changed in place to that of the LoRA.

    Raises:
        ValueError: As `lora_tensors`, or if `config` is None.
    """
    if config is None:
        raise ValueError(
            "This adapter can be converted only while PEFT saves it. Save it with "
            "save_pretrained(path), then call peft_corda.export_lora(path, another_path)."
        )
    converted, rank = lora_tensors(tensors, config)
    # PEFT doubles `r` and `lora_alpha` before it writes the config.
    lora = lora_config(config, rank // 2)
    config.__dict__.clear()
    config.__dict__.update(lora.__dict__)
    config.__class__ = ConvertedConfig  # type: ignore[assignment]
    return converted
