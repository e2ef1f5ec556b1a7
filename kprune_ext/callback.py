"""Pruning within a training run."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import ParallelMode, TrainingArguments

from .becoming import become_
from .modeling.classes import UnevenLayers
from .modeling.saved_report import report_beside
from .preparation.config import KPruneConfig
from .preparation.given import given_config
from .preparation.rehearsal import rehearse
from .pruning import kprune
from .report.report import REPORT_FILE, KPruneReport


class KPruneCallback(TrainerCallback):
    """Prunes the model that a `Trainer` trains; training continues with the pruned model.

    The Trainer's model object itself becomes the pruned one, so `trainer.model`, its checkpoints and
    the caller's references to it are all pruned. Parameters that keep their shape keep their optimizer
    state; for the others it is reset. The learning rate schedule continues unchanged.

    To resume a run after the pruning, load the model from the checkpoint
    (`AutoModelFor….from_pretrained(checkpoint)`); it is not pruned again.

    Args:
        dataloader: Calibration data of `kprune_ext.kprune`; labels are ignored. For texts, the Trainer's
            `processing_class` is the tokenizer unless the options have another.
        config: Options of `kprune_ext.kprune`; by default half of the encoder's FLOPs are removed.
        at_step: Number of optimizer steps after which to prune; 0 prunes before the first one.
        options: Other arguments of `kprune_ext.kprune`.

    Raises:
        ValueError: If `at_step` is not a whole number of at least 0; and when training starts, if the
            run is shorter than that, distributed or compiled, if the model cannot be pruned, or its
            checkpoints could not be saved, or if the run would load a model from before the pruning.
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        config: KPruneConfig | None = None,
        at_step: int = 0,
        **options: Any,
    ) -> None:
        self.dataloader = dataloader
        self.config = given_config(config, options.pop("reduction", None))
        self.at_step = _whole_number(at_step)
        self.options = options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the run can be pruned, and prunes if `at_step` is 0."""
        model = kwargs["model"]
        if state.global_step >= self.at_step and state.global_step > 0:
            _require_pruned(model, state.global_step, self.at_step)
            return  # resumed from a checkpoint of the pruned model
        _require_plain_run(args, self.at_step)
        if state.max_steps and self.at_step > state.max_steps:
            raise ValueError(
                f"at_step={self.at_step} never comes: this run ends after {state.max_steps} steps. Pass "
                "a step within the run, or train for longer (max_steps, num_train_epochs)."
            )
        options = _with_tokenizer(self.options, kwargs)
        unsaved = rehearse(model, self.dataloader, self.config, **_checked(options))
        if unsaved is not None and (args.save_strategy != "no" or args.load_best_model_at_end):
            raise ValueError(
                "The Trainer could not save checkpoints of the pruned model, as they would be loaded as "
                f"another model: {unsaved}. Pass save_strategy='no' to train without checkpoints."
            )
        if self.at_step == 0:
            self._prune(**kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warns if training ended before the pruning."""
        if state.global_step < self.at_step:
            warnings.warn(
                f"The model was not pruned: training ended after step {state.global_step}, before "
                f"at_step={self.at_step}.",
                UserWarning,
                stacklevel=2,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prunes at `at_step`, before that step's evaluation and checkpoint."""
        if self.at_step == state.global_step:
            self._prune(**kwargs)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the report beside a checkpoint that transformers' own class has written.

        It tells later runs that the model, whose layers have equal sizes, is pruned.
        """
        folder = Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        report = _report_of(kwargs["model"]) if state.is_world_process_zero else None
        if report is not None and folder.is_dir() and not (folder / REPORT_FILE).exists():
            report.save_json(folder / REPORT_FILE)

    def _prune(self, model: Any, optimizer: Any = None, **others: Any) -> None:
        options = _with_tokenizer(self.options, others)
        pruned = kprune(model, self.dataloader, self.config, **options)
        become_(model, pruned, optimizer)


def _whole_number(at_step: Any) -> int:
    if isinstance(at_step, float) and at_step.is_integer():
        at_step = int(at_step)
    try:
        if isinstance(at_step, bool):
            raise TypeError
        number = operator.index(at_step)
    except TypeError:
        raise ValueError(
            f"at_step={at_step!r} is not a whole number of steps. Pass 0 to prune before training, or "
            "the number of optimizer steps after which to prune."
        ) from None
    if number < 0:
        raise ValueError(f"at_step={at_step} is negative. Pass 0 to prune before training.")
    return number


def _with_tokenizer(options: Mapping[str, Any], event: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the tokenizer that the Trainer hands to its callbacks, if it has one."""
    return {"tokenizer": event.get("processing_class"), **options}


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "progress"}


def _report_of(model: Any) -> KPruneReport | None:
    """Returns the report of a pruned model whose class may be transformers' own."""
    return getattr(model, "kprune_report", None) or report_beside(model)


def _require_pruned(model: Any, step: int, at_step: int) -> None:
    is_pruned = any(isinstance(module, UnevenLayers) for module in model.modules())
    if not is_pruned and _report_of(model) is None:
        raise ValueError(
            f"The run was resumed at step {step}, and the model was to be pruned after step {at_step}, "
            "but it is not. Load it from the checkpoint (from_pretrained) if it was pruned before that; "
            "otherwise pass a later at_step."
        )


def _require_plain_run(args: TrainingArguments, at_step: int) -> None:
    if args.parallel_mode is ParallelMode.DISTRIBUTED or args.deepspeed or args.torch_compile:
        raise ValueError(
            "KPruneCallback cannot prune inside a distributed or compiled run, whose wrappers keep "
            "the old weights. Prune first with model = kprune(model, dataloader), then train it."
        )
    if at_step and args.load_best_model_at_end:
        raise ValueError(
            f"load_best_model_at_end=True may load a checkpoint from before step {at_step}, "
            "whose weights do not fit the pruned model. Leave it out, or pass at_step=0."
        )
