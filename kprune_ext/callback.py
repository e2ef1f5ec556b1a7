"""Pruning within a training run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import ParallelMode, TrainingArguments

from .config import KPruneConfig
from .modeling.classes import model_task
from .pruning import kprune


class KPruneCallback(TrainerCallback):
    """Prunes the model that a `Trainer` trains; training continues with the pruned model.

    The Trainer's model object itself becomes the pruned one, so `trainer.model`, its checkpoints and
    the caller's references to it are all pruned. Parameters that keep their shape keep their optimizer
    state; for the others it is reset. The learning rate schedule continues unchanged.

    To resume a run after the pruning, load the model from the checkpoint
    (`AutoModelFor….from_pretrained(checkpoint)`); it is not pruned again.

    Args:
        dataloader: Calibration data of `kprune_ext.kprune`; labels are ignored.
        config: Options of `kprune_ext.kprune`; by default half of the encoder's FLOPs are removed.
        at_step: Number of optimizer steps after which to prune; 0 prunes before the first one.
        options: Other arguments of `kprune_ext.kprune`.

    Raises:
        ValueError: If `at_step` is negative; and when training starts, if the model cannot be pruned,
            the run is distributed or compiled, or it would load a model from before the pruning.
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        config: KPruneConfig | None = None,
        at_step: int = 0,
        **options: Any,
    ) -> None:
        if at_step < 0:
            raise ValueError(f"at_step={at_step} is negative. Pass 0 to prune before training.")
        self.dataloader = dataloader
        self.config = config
        self.at_step = at_step
        self.options = options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the run can be pruned, and prunes if `at_step` is 0."""
        if state.global_step > self.at_step:
            return  # resumed from a checkpoint of the pruned model
        _require_plain_run(args, self.at_step)
        model_task(kwargs["model"])
        if self.at_step == state.global_step == 0:
            self._prune(**kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prunes at `at_step`, before that step's evaluation and checkpoint."""
        if self.at_step == state.global_step:
            self._prune(**kwargs)

    def _prune(self, model: Any, optimizer: Any = None, **_: Any) -> None:
        pruned = kprune(model, self.dataloader, self.config, **self.options)
        become_(model, pruned, optimizer)


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


@torch.no_grad()
def become_(model: PreTrainedModel, pruned: PreTrainedModel, optimizer: Any = None) -> None:
    """Turns a model object into the pruned one, in place, and updates its optimizer's parameters.

    Args:
        model: The model that was pruned; takes over the class, modules and config of `pruned`.
        pruned: The pruned model; it must not be used afterwards.
        optimizer: Optimizer of the model; parameters that kept their shape keep their state.
    """
    training = model.training
    old = dict(model.named_parameters())
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, new in list(pruned.named_parameters()):
        before = old[name]
        if before.shape == new.shape:
            # Keep the parameter object, so that references to it stay valid.
            before.copy_(new)
            parent, _, leaf = name.rpartition(".")
            setattr(pruned.get_submodule(parent), leaf, before)
        else:
            replaced[before] = new
    # Keep attributes set by accelerate and others, such as a forward under autocast.
    added = {key: value for key, value in vars(model).items() if key not in vars(pruned)}
    model.__class__ = type(pruned)
    vars(model).clear()
    vars(model).update(vars(pruned) | added)
    model.tie_weights()
    model.train(training)
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
        for parameter in replaced:
            optimizer.state.pop(parameter, None)
