"""K-prune (arXiv 2308.03449): knowledge-preserving pruning of an encoder without retraining."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures.table import find_architecture
from .architectures.tasks import Predict, ProblemType, Task, problem_type
from .budget.costs import budget_for, cost_tables, least_units, unit_flops
from .budget.latency import LatencyTable
from .budget.latency_measurement import measure_latency
from .budget.search import search_masks
from .calibration.device_map import (
    homes_of,
    input_device,
    moving_inputs,
    require_whole_layers,
    spread_out,
)
from .calibration.hooks import evaluating
from .calibration.layer_stack import Encoder, plain_outputs
from .calibration.sharing import own_model, processes_of, shared_data
from .calibration.state_memory import state_memory
from .calibration.streams import Stream, start_streams
from .common.memory import few_kept_kernels, give_back
from .common.placement import moves_weights
from .config import KPruneConfig
from .knowledge.measure import Signal, measure_knowledge, teacher_logits
from .knowledge.scores import unit_scores
from .modeling.classes import model_task
from .modeling.copying import record_kept, uneven_copy
from .progress import progress_over
from .report.making import make_report
from .tuning.logit_scale import scale_logits
from .tuning.projection import from_main, normal_equations, summed, tune
from .units.sublayers import SubLayer, layers_path, sublayers
from .units.surgery import set_output, shrink


def kprune(
    model: PreTrainedModel,
    dataloader: Iterable[Any],
    config: KPruneConfig | None = None,
    *,
    predict: Predict | None = None,
    latency: LatencyTable | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Remove attention heads and feed-forward neurons, and tune what stays; no training.

    The sub-layers are pruned bottom-up (arXiv 2308.03449, algorithm 1). For each: measure what the
    units of it and of all later ones know, find the global threshold that fits the budget, remove
    the units of this sub-layer that fall below, and fit its output projection so that its output
    plus the residual stream is again what the original model has there. At the end class probabilities
    are brought nearer to the original's by one factor on all logits.

    Args:
        model: a supported model (see the error for a list); left exactly as it was. It may lie on
            several devices, or partly in CPU memory or on disk (``device_map``), as long as each
            transformer layer is on one; so does the result, but for what was on disk. What is not
            on a device all the time is pruned on the CPU.
        dataloader: batches as mappings of tensors, ``input_ids`` and ``attention_mask``
            ``(batch, tokens)``, or ``pixel_values``, and whatever else the model takes. Labels are
            ignored. Batch size and padding do not matter.
        config: options; by default half of the encoder's FLOPs are removed.
        predict: ``(model, batch) -> logits`` in place of what the model's task says: ``(batch,
            classes)``, or ``(batch, positions, classes)`` for several predictions per sample. It
            must call ``model`` with the batch. They are taken for classes, or for what
            ``config.problem_type`` says.
        latency: for ``metric="latency"``, what :func:`kprune_ext.measure_latency` found; by
            default it is measured with 32 sequences of the calibration data's mean length.
        accelerator: of a run of several processes, each of which calls this function: each works on
            its share of the data, up to its share of ``config.max_tokens``, and all return the same
            model to the bit. A plain ``DataLoader`` is dealt out to the processes; other iterables
            and prepared loaders are taken to give each process batches of its own. The model may be
            wrapped for data-parallel training. Without it, a process works alone.
        progress: show a progress bar, in the main process.

    Returns:
        A new model with smaller matrices, in evaluation mode, that transformers can save, load and
        train. Its ``kprune_report`` tells what was kept. What ``config.metric`` counts (by default
        FLOPs, multiply-adds times 2, see :mod:`kprune_ext.cost`) is at most (1 − reduction) of the
        original's.

    Raises:
        ValueError: the model is not supported; the calibration data are empty or have no unmasked
            token; the budget leaves no unit; activations are NaN or infinite.
        TypeError: a batch is not a mapping of tensors; a projection is not a plain linear layer.
        RuntimeError: another process failed; the message says how.
    """
    config = KPruneConfig() if config is None else config
    processes = processes_of(accelerator)
    model = own_model(model, accelerator)
    task = model_task(model)
    architecture = find_architecture(model)
    dense = sublayers(model, architecture)
    homes = homes_of(model)
    require_whole_layers(model, layers_path(model, architecture), homes)
    pruned: Any = uneven_copy(model, homes).requires_grad_(False)
    student = sublayers(pruned, architecture)
    encoder = Encoder(pruned, architecture)

    def image_tokens(inputs: Mapping[str, Tensor]) -> int:
        one = {name: value[:1].to(input_device(pruned)) for name, value in inputs.items()}
        return encoder.enter(one)[0].shape[1]

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(plain_outputs(pruned.config))
        stack.enter_context(moving_inputs(pruned, layers_path(pruned, architecture), homes))
        memory = stack.enter_context(state_memory(config.state_bytes))
        data = shared_data(model, dataloader, config, image_tokens, accelerator, processes)
        length = config.sequence_length or max(1, round(data.tokens / data.count))
        if config.metric == "latency" and latency is None:
            with processes.together():
                if processes.is_main:
                    latency = measure_latency(model, sequence_length=length)
            latency = processes.first(latency)
        costs = cost_tables(model, dense, config.metric, length, latency)
        budget = left = budget_for(costs, config.reduction)
        least = least_units(costs, budget, config.min_share)
        stack.enter_context(few_kept_kernels(pruned))  # latency is measured as the model will run
        with processes.together():
            predicting = predict or task.predict
            asked = predicting if config.unread_weight < 1 else None
            streams = start_streams(encoder, data, config, memory, asked)
        scored = [stream for stream in streams if stream.scored]
        signal = Signal(
            predicting,
            config.problem_type or _meaning(model, task, predict),
            config.temperature,
            config.max_score_passes,
            depth_tokens=4 * config.batch_tokens,
            unread_weight=config.unread_weight,
        )
        if config.sensitivity == "gradient":
            with processes.together():
                teacher = teacher_logits(student, encoder, signal.predict, scored)
            signal = replace(signal, teacher=teacher)

        kept: list[list[int]] = []
        errors: list[float] = []
        scores: list[Tensor] = []
        silent = not (progress and processes.is_main)
        for step in progress_over(student, config.schedule, disable=silent):
            target = student[step]
            if target.kind == "attention" or config.schedule == "per_sublayer":
                knowledge = measure_knowledge(student[step:], encoder, scored, signal, processes)
                give_back()  # blocks of many sizes, else kept by the process in ever more pieces
                scores = unit_scores(student[step:], knowledge, config)
            masks = search_masks(scores, costs[step:], left, least[step:])
            keep = processes.gather(masks[0].nonzero().flatten().tolist())[0]
            if target.kind == "attention":
                whole = _at_hand(dense[step], target)
            shrink(target, keep)
            with processes.together():
                original = replace(dense[step], module=whole)
                last = target.layer == student[-1].layer
                weight = config.unread_weight if last else 1.0
                own = normal_equations(original, target, encoder, streams, weight, config)
            equations = [summed(part, processes) for part in own]
            fit = from_main(tune(target, equations, config), processes)
            set_output(target, fit.weight, fit.bias)
            with processes.together():
                _advance(target, encoder, streams)
            left -= float(costs[step][len(keep)])
            scores = scores[1:]
            kept.append(keep)
            errors.append(fit.error)
            del own, equations, fit  # before the next step's
            give_back()

        scale = None
        if config.scale_logits:
            scale = scale_logits(encoder, streams, signal.predict, signal.problem, processes)

    record_kept(pruned, zip(kept[::2], kept[1::2], strict=True))
    _copy_requires_grad(model, pruned)
    pruned = spread_out(pruned, homes)
    pruned.kprune_report = make_report(
        model,
        pruned,
        zip(
            dense,
            student,
            [unit_flops(model, sublayer, length) for sublayer in dense],
            errors,
            strict=True,
        ),
        config=config,
        costs=costs,
        budget=budget,
        length=length,
        samples=data.count,
        tokens=data.tokens,
        logit_scale=scale,
    )
    return pruned


def _meaning(model: PreTrainedModel, task: Task, predict: Predict | None) -> ProblemType:
    return problem_type(model, task) if predict is None else "single_label_classification"


def _at_hand(dense: SubLayer, target: SubLayer) -> nn.Module:
    """The dense model's layer; a copy of the student's, not pruned yet, if its weights are elsewhere.

    They would have to be brought in for every batch.
    """
    return deepcopy(target.module) if moves_weights(dense.module) else dense.module


@torch.no_grad()
def _advance(target: SubLayer, encoder: Encoder, streams: Sequence[Stream]) -> None:
    """Move the student's states past the pruned and tuned sub-layer."""
    for stream in streams:
        context = stream.contexts_in(encoder)[target.layer]
        stream.student.copy_(target.run(stream.student, context))


def _copy_requires_grad(model: PreTrainedModel, pruned: PreTrainedModel) -> None:
    every = model.named_parameters(
        remove_duplicate=False
    )  # tied ones, too: on two devices they part
    trainable = {name: parameter.requires_grad for name, parameter in every}
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(trainable[name])
