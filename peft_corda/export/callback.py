"""`CordaExportCallback`, which exports a plain LoRA at the end of training."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, extract_model_from_parallel
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kprune_ext.files.writing import resolved

from ..config import CordaConfig
from .export import check_target, export_lora


class CordaExportCallback(TrainerCallback):
    """Exports the active CORDA adapter as a plain LoRA when training ends, on the main process.

    The arguments and the model are checked before training begins. With `load_best_model_at_end`, the
    best model is exported.

    Args:
        dst: Folder to write, as for `export_lora`.
        rank: Rank of the LoRA factors, as for `export_lora`.
        dtype: Dtype of the LoRA factors, as for `export_lora`.

    Raises:
        ValueError: As `export_lora`, or if the model does not have exactly one active adapter, of type
            CORDA, or its weights are sharded over processes.
    """

    def __init__(
        self,
        dst: str | os.PathLike[str],
        rank: int | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        check_target(os.fspath(dst), rank, dtype)
        # The current folder may change during a run.
        self.dst, self.rank, self.dtype = resolved(dst, "dst"), rank, dtype

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check_whole()
        _corda_adapter(kwargs["model"])
        if state.is_world_process_zero:
            check_target(self.dst, self.rank, self.dtype)
            self._check_names()
            self._check_apart(args)

    def _check_names(self) -> None:
        """Raise OSError if the file system finds the folder's name, or one above it, too long."""
        parent, *names = self.dst, os.path.basename(self.dst)
        while not os.path.isdir(parent := os.path.dirname(parent)):
            names.insert(0, os.path.basename(parent))
        for name in names[:-1]:
            with suppress(FileNotFoundError):
                os.lstat(os.path.join(parent, name))
        # The export is written under a temporary name, which is longer by 38 characters.
        with tempfile.NamedTemporaryFile(
            dir=parent, prefix=f".{names[-1]}.", suffix="." + 27 * "x"
        ):
            pass

    def _check_apart(self, args: TrainingArguments) -> None:
        """Check that the Trainer itself writes nothing into the folder, which would be replaced."""
        output = os.path.realpath(args.output_dir or "trainer_output")
        inside = self.dst == output or output.startswith(os.path.join(self.dst, ""))
        if inside and args.save_strategy != "no":
            raise ValueError(
                f"CordaExportCallback is to write {self.dst!r}, but the Trainer saves its checkpoints "
                f"there (output_dir={args.output_dir!r}), and the entire folder would be replaced. "
                "Give another folder, such as one inside output_dir."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = _save(kwargs["model"], folder)
            export_lora(checkpoint, self.dst, self.rank, self.dtype)


def _save(wrapped: nn.Module, folder: str) -> str:
    """Saves the active adapter and returns its folder, which is `folder` or inside it."""
    model, name = _corda_adapter(wrapped)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, selected_adapters=[name])
        return folder if name == "default" else os.path.join(folder, name)
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    whole = {f"base_model.model.{key}": value.cpu().clone() for key, value in tensors.items()}
    save_file(whole, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
    model.peft_config[name].save_pretrained(folder)
    return folder


def _corda_adapter(wrapped: nn.Module) -> tuple[Any, str]:
    model: Any = extract_model_from_parallel(wrapped, keep_torch_compile=False)
    configs = getattr(model, "peft_config", {})
    names = _active_adapters(model)
    if len(names) != 1 or not isinstance(configs.get(names[0]), CordaConfig):
        raise ValueError(
            "CordaExportCallback needs exactly one active adapter, of type CORDA, but this "
            f"{type(model).__name__} has {names or 'none'} active. Activate one CORDA adapter with "
            "set_adapter, or leave out the callback."
        )
    return model, names[0]


def _active_adapters(model: Any) -> list[str]:
    """Names of the adapters that are active in a model, whoever added them.

    Layers are asked where the model is not PEFT's: transformers knows of its own adapters alone, not of
    those that `inject_adapter_in_model` added, and transformers 5.24 wants PEFT 0.22 for its own.
    """
    if isinstance(model, PeftModel):
        return list(model.active_adapters)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return sorted({name for layer in layers for name in layer.active_adapters})


def _check_whole() -> None:
    if not AcceleratorState._shared_state:
        return
    state = AcceleratorState()
    plugin = getattr(state, "deepspeed_plugin", None)
    if state.distributed_type == DistributedType.FSDP or getattr(plugin, "zero_stage", 0) == 3:
        raise ValueError(
            "CordaExportCallback needs the full adapter on the main process, but FSDP and ZeRO-3 shard "
            "it over processes. Leave the callback out, and call export_lora on the saved checkpoint."
        )
