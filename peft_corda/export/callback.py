"""`CordaExportCallback`: a plain LoRA at the end of training."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kprune_ext.common.files import resolved

from ..config import CordaConfig
from .export import check_target, export_lora


class CordaExportCallback(TrainerCallback):
    """Exports the active CORDA adapter as a plain LoRA when training ends, on the main process.

    What can be checked is checked before training begins. With `load_best_model_at_end` it is the best
    model that is exported.

    Args:
        dst: folder to write, as for `export_lora`.
        rank: of the LoRA factors, as for `export_lora`.
        dtype: of the LoRA factors, as for `export_lora`.

    Raises:
        ValueError: as `export_lora`, or if the model has no single active CORDA adapter, or its weights
            are spread over processes.
    """

    def __init__(
        self,
        dst: str | os.PathLike[str],
        rank: int | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        check_target(os.fspath(dst), rank, dtype)
        # A run may change the current folder on its way.
        self.dst, self.rank, self.dtype = resolved(dst, "dst"), rank, dtype

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check_whole()
        _corda_adapter(kwargs["model"])
        if state.is_world_process_zero:
            check_target(self.dst, self.rank, self.dtype)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = _save(kwargs["model"], folder)
            export_lora(checkpoint, self.dst, self.rank, self.dtype)


def _save(wrapped: nn.Module, folder: str) -> str:
    """Where in `folder` the active adapter was saved to."""
    model, name = _corda_adapter(wrapped)
    if not isinstance(model, PeftModel):
        model.save_pretrained(
            folder
        )  # a transformers model with `add_adapter`: the active one alone
        return folder
    model.save_pretrained(folder, selected_adapters=[name])
    return folder if name == "default" else os.path.join(folder, name)


def _corda_adapter(wrapped: nn.Module) -> tuple[Any, str]:
    model: Any = extract_model_from_parallel(wrapped, keep_torch_compile=False)
    configs = getattr(model, "peft_config", {})
    active = model.active_adapters if configs else []
    names = active() if callable(active) else active
    if len(names) != 1 or not isinstance(configs.get(names[0]), CordaConfig):
        raise ValueError(
            f"CordaExportCallback exports the one active CORDA adapter of a model, and this "
            f"{type(model).__name__} has {names or 'none'} active. Activate a CORDA adapter with "
            "set_adapter, or leave out the callback."
        )
    return model, names[0]


def _check_whole() -> None:
    if not AcceleratorState._shared_state:
        return
    state = AcceleratorState()
    plugin = getattr(state, "deepspeed_plugin", None)
    if state.distributed_type == DistributedType.FSDP or getattr(plugin, "zero_stage", 0) == 3:
        raise ValueError(
            "CordaExportCallback needs the whole adapter on the main process, and FSDP and ZeRO-3 "
            "spread it over all. Leave it out, and call export_lora on the saved checkpoint."
        )
