"""`CordaCalibrationCallback`, which calibrates when training begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kprune_ext.common.processes import Processes

from ..adapter_layers.layer import CordaLayer
from ..config import CordaConfig
from .initialize import initialize_corda


class CordaCalibrationCallback(TrainerCallback):
    """Calibrates and starts the model's CORDA adapter when training begins.

    This is for trainers that call `get_peft_model` themselves, such as TRL's with `peft_config=`. An
    adapter that has a start already, from factors or from a checkpoint, is left as it is.

    Args:
        dataloader: Calibration data, as for `calibrate`; None with the option `covariances`. For texts,
            the trainer's `processing_class` is the tokenizer unless the options have another.
        options: Further arguments of `initialize_corda`, such as `max_memory`.

    Raises:
        ValueError: When training begins, if the model has no CORDA adapter, or as `calibrate`.
    """

    def __init__(self, dataloader: Iterable[Any] | None = None, **options: Any) -> None:
        self.dataloader = dataloader
        self.options = options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the active adapter, unless it has a start."""
        model = kwargs["model"]
        name = getattr(model, "active_adapter", None)
        configs = getattr(model, "peft_config", {})
        if not (isinstance(model, PeftModel) and isinstance(configs.get(name), CordaConfig)):
            raise ValueError(
                "CordaCalibrationCallback needs a model with an active CORDA adapter, but the trainer "
                f"has a {type(model).__name__}. Pass peft_config=CordaConfig(...) to the trainer, or "
                "wrap the model with get_peft_model first."
            )
        layers = [module for module in model.modules() if isinstance(module, CordaLayer)]
        if all(name in layer.lora_start_B.started for layer in layers):
            return
        options = {"tokenizer": kwargs.get("processing_class"), **self.options}
        options.setdefault("progress", not args.disable_tqdm and Processes().is_main)
        initialize_corda(model, self.dataloader, **options)
