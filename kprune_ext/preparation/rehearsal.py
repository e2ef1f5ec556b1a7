"""The checks of a pruning run, without the run: for pruning that comes later."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator

from ..architectures.tasks import Predict
from ..budget.costs import budget_for, cost_tables
from ..budget.latency import LatencyTable
from ..budget.uniform import allowed_sizes
from ..files.writing import check_output_file
from ..samples.samples import collect_samples
from ..units.sublayers import layers_path, sublayers
from .config import KPruneConfig
from .data import batches_for, image_tokens, run_whole
from .guard import check_copy
from .run import contexts_of, copied_student, example

# Tokens per sequence at which FLOPs are counted before the data are known.
_LENGTH = 128


def rehearse(
    model: Any,
    dataloader: Iterable[Any],
    config: KPruneConfig | None = None,
    *,
    predict: Predict | None = None,
    latency: LatencyTable | None = None,
    accelerator: Accelerator | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    covariances: str | os.PathLike[str] | None = None,
) -> str | None:
    """Checks what can be checked of a later call of `kprune`, whose arguments and errors are the same.

    The first batch is read, unless the data are an iterator, which yields them only once. The global
    random state is left as it was.

    Returns:
        Why the pruned model could not be saved, or None.
    """
    config = KPruneConfig() if config is None else config
    if covariances is not None:
        check_output_file(covariances, "covariances")
    with ExitStack() as block:
        block.enter_context(torch.random.fork_rng(devices=[]))
        copied = copied_student(model, config, predict, accelerator)
        given, stack = copied.given, copied.stack
        batches = batches_for(given, dataloader, tokenizer=tokenizer, max_length=max_length)
        config = given.options(config)
        for context in contexts_of(copied):
            block.enter_context(context)
        sample = None
        if not isinstance(dataloader, Iterator):
            first = next(iter(batches), None)
            samples = collect_samples(
                given.model,
                [] if first is None else [first],
                1,
                lambda inputs: image_tokens(stack, inputs),
                needed=first is None,
                runs=(lambda inputs: run_whole(given, inputs)) if given.is_own else None,
                causal=given.architecture.is_causal,
                targets=given.predicts_next_tokens,
            )
            sample = example(given, samples)
        architecture = given.architecture
        layers = layers_path(given.model, architecture)
        check_copy(given, copied.whole, layers, copied.device_map, sample)
        metric = config.metric or "flops"
        if metric != "latency" or latency is not None:
            length = config.sequence_length or _LENGTH
            targets = sublayers(given.model, architecture)
            if config.layout == "uniform":
                # Neurons, which can always go, are the larger part of FLOPs the shorter the texts are.
                least = config.sequence_length or 1
                costs = cost_tables(given.model, targets, metric, least, latency)
                kinds = [target.kind for target in targets]
                allowed_sizes(given.model, kinds, costs, config.reduction, config.round_to)
            costs = cost_tables(given.model, targets, metric, length, latency)
            budget_for(costs, config.reduction)
        unsaved: str | None = getattr(stack.model, "kprune_unsaved", None)
        return unsaved
