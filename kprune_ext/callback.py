"""Pruning inside a training run."""

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
    """Prunes the model that a ``Trainer`` trains, and lets it go on with what is left.

    The Trainer's model object itself becomes the pruned one, so ``trainer.model``, its checkpoints
    and what the caller holds are all pruned. Parameters that keep their shape keep their optimizer
    state; for the others it starts anew. The learning rate schedule goes on as it was.

    To resume a run after the pruning, load the model from the checkpoint
    (``AutoModelFor….from_pretrained(checkpoint)``); it is not pruned again.

    Args:
        dataloader: what :func:`kprune_ext.kprune` calibrates on; labels are ignored.
        config: its options; by default half of the encoder's FLOPs are removed.
        at_step: after how many optimizer steps; 0 is before the first one.
        options: other arguments of :func:`kprune_ext.kprune`.

    Raises:
        ValueError: ``at_step`` is negative; when training starts, where the model cannot be pruned,
            the run is distributed or compiled, or would load a model of before the pruning.
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
        """Check that the run can be pruned, and do it if it is due."""
        if state.global_step > self.at_step:
            return  # resumed from a checkpoint of the pruned model
        _require_plain_run(args, self.at_step)
        model_task(kwargs["model"])
        if self.at_step == state.global_step == 0:
            self._prune(**kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune, if it is time; this is before the step's evaluation and checkpoint."""
        if self.at_step == state.global_step:
            self._prune(**kwargs)

    def _prune(self, model: Any, optimizer: Any = None, **_: Any) -> None:
        pruned = kprune(model, self.dataloader, self.config, **self.options)
        become_(model, pruned, optimizer)


def _require_plain_run(args: TrainingArguments, at_step: int) -> None:
    if args.parallel_mode is ParallelMode.DISTRIBUTED or args.deepspeed or args.torch_compile:
        raise ValueError(
            "KPruneCallback cannot prune inside a distributed or compiled run, whose wrappers hold "
            "on to the old weights. Prune first: model = kprune(model, dataloader), then train it."
        )
    if at_step and args.load_best_model_at_end:
        raise ValueError(
            f"load_best_model_at_end=True may load a checkpoint of before step {at_step}, whose "
            "weights do not fit the pruned model. Leave it out, or prune at_step=0."
        )


@torch.no_grad()
def become_(model: PreTrainedModel, pruned: PreTrainedModel, optimizer: Any = None) -> None:
    """Make a model object the pruned one, in place, and have an optimizer go on with its parameters.

    Args:
        model: what ``pruned`` was made of; takes over its class, modules and config.
        pruned: not to be used afterwards.
        optimizer: of the model's parameters; parameters that kept their shape keep their state.
    """
    training = model.training
    old = dict(model.named_parameters())
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, new in list(pruned.named_parameters()):
        before = old[name]
        if before.shape == new.shape:
            # The object stays, so whoever refers to it, stays right.
            before.copy_(new)
            parent, _, leaf = name.rpartition(".")
            setattr(pruned.get_submodule(parent), leaf, before)
        else:
            replaced[before] = new
    # What accelerate and others have put on the object, such as a forward under autocast, stays.
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
