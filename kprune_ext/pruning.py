"""K-prune (arXiv 2308.03449): knowledge-preserving pruning of an encoder without retraining."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel

from kprune_ext import cost
from kprune_ext.architectures import SubLayer, find_architecture, sublayers
from kprune_ext.calibration import Stream, collect_samples, require_finite, start_streams
from kprune_ext.config import KPruneConfig
from kprune_ext.knowledge import Knowledge, measure_knowledge, problem_type
from kprune_ext.masking import evaluating, watching
from kprune_ext.modeling import (
    KeptUnits,
    kept_units,
    shrink,
    store_kept_units,
    uneven_copy,
    unit_dimensions,
)
from kprune_ext.reconstruction import NormalEquations, TunedProjection, tune_projection
from kprune_ext.report import KPruneReport, SubLayerReport
from kprune_ext.search import search_masks


def kprune(
    model: PreTrainedModel,
    dataloader: Iterable[Any],
    config: KPruneConfig | None = None,
    *,
    progress: bool = True,
) -> PreTrainedModel:
    """Remove attention heads and feed-forward neurons, and tune what stays; no training.

    The sub-layers are pruned bottom-up (arXiv 2308.03449, algorithm 1). For each: measure what the
    units of it and of all later ones know, find the global threshold that fits the budget, remove
    the units of this sub-layer that fall below, and fit its output projection so that its output
    plus the residual stream is again what the original model has there.

    Args:
        model: a supported model (see the error for a list); left exactly as it was.
        dataloader: batches as mappings of tensors, ``input_ids`` and ``attention_mask``
            ``(batch, tokens)`` and whatever else the model takes. Labels are ignored. Batch size
            and padding do not matter.
        config: options; by default half of the encoder's FLOPs are removed.
        progress: show a progress bar.

    Returns:
        A new model with smaller matrices, in evaluation mode, that transformers can save, load and
        train. Its ``kprune_report`` tells what was kept. FLOPs (multiply-adds times 2, see
        :mod:`kprune_ext.cost`) are at most (1 − reduction) of the original's.

    Raises:
        ValueError: the model is not supported; the calibration data are empty or have no unmasked
            token; the budget leaves no unit; activations are NaN or infinite.
        TypeError: a batch is not a mapping of tensors; a projection is not a plain linear layer.
    """
    config = KPruneConfig() if config is None else config
    architecture, task = find_architecture(model)
    dense = sublayers(model, architecture, architecture.layers)
    samples = collect_samples(model, dataloader, config.max_tokens)
    tokens = sum(sample.count for sample in samples)
    length = config.sequence_length or max(1, round(tokens / len(samples)))
    unit_flops = [_unit_flops(sublayer, length) for sublayer in dense]
    budget = left = _budget(dense, unit_flops, config.reduction)

    with evaluating(model):
        streams = start_streams(model, architecture, samples, config)
        pruned: Any = uneven_copy(model).requires_grad_(False)
        student = sublayers(pruned, architecture, architecture.layers)
        kept: list[Tensor] = []
        tuned: list[TunedProjection] = []
        scores: list[Tensor] = []
        steps = tqdm(range(len(student)), desc="K-prune", unit="sub-layer", disable=not progress)
        for step in steps:
            target = student[step]
            if target.kind == "attention" or config.schedule == "per_sublayer":
                knowledge = measure_knowledge(
                    student[step:],
                    partial(task.logits, pruned),
                    [stream for stream in streams if stream.scored],
                    problem=problem_type(model),
                    temperature=config.temperature,
                    max_classes=config.max_score_classes,
                )
                scores = _scores(student[step:], knowledge, config)
            keep = search_masks(scores, unit_flops[step:], left)[0].nonzero().flatten()
            fit = _tune(dense[step], target, keep, streams, config.ridge)
            shrink(target, keep, fit.weight, fit.bias)
            _advance(target, streams)
            left -= len(keep) * unit_flops[step]
            scores = scores[1:]
            kept.append(keep.cpu())
            tuned.append(fit)

    _record_kept(pruned, kept)
    _copy_requires_grad(model, pruned)
    pruned.kprune_report = KPruneReport(
        sublayers=tuple(
            _report(before, after, flops, fit)
            for before, after, flops, fit in zip(dense, student, unit_flops, tuned, strict=True)
        ),
        reduction=config.reduction,
        budget=budget,
        sequence_length=length,
        samples=len(samples),
        tokens=tokens,
        parameters=pruned.num_parameters(),
        parameters_before=model.num_parameters(),
    )
    return pruned


def _unit_flops(sublayer: SubLayer, length: int) -> int:
    hidden = sublayer.output.out_features
    if sublayer.kind == "attention":
        return cost.head_flops(hidden, sublayer.unit_size, length)
    return cost.neuron_flops(hidden, length, len(sublayer.inputs) + 1)


def _budget(dense: Sequence[SubLayer], unit_flops: Sequence[int], reduction: float) -> int:
    total = sum(sublayer.units * flops for sublayer, flops in zip(dense, unit_flops, strict=True))
    budget = int((1 - reduction) * total)
    cheapest = min(unit_flops)
    if budget < cheapest:
        raise ValueError(
            f"reduction={reduction} cannot be reached: it leaves {budget:,} of {total:,} FLOPs, "
            f"and the smallest unit takes {cheapest:,}. The largest reduction for this model is "
            f"{1 - cheapest / total:.6f}."
            if total
            else "The model has no heads and neurons left to prune. Pass the original model."
        )
    return budget


def _scores(
    targets: Sequence[SubLayer], knowledge: Sequence[Knowledge], config: KPruneConfig
) -> list[Tensor]:
    """Knowledge of every unit as one number; a head's is mu times its mean over dimensions."""
    scores = []
    for sublayer, known in zip(targets, knowledge, strict=True):
        is_head = sublayer.kind == "attention" and config.mu is not None
        weight = (config.mu or 1.0) / sublayer.unit_size if is_head else 1.0
        scores.append(known.score(config.lambda_rep, weight))
    return scores


@torch.no_grad()
def _tune(
    dense: SubLayer, target: SubLayer, keep: Tensor, streams: Sequence[Stream], ridge: float
) -> TunedProjection:
    """Fit the target's output projection on the units kept; moves the teacher's states past it."""
    dims = unit_dimensions(keep, target.unit_size)
    weight = target.output.weight.detach()[:, dims]
    equations = NormalEquations.zeros(len(dims), len(weight), weight.device)
    with watching(dense) as teacher, watching(target) as student:
        for stream in streams:
            stream.teacher = dense.run(stream.teacher, stream.attention_mask)
            target.run(stream.student, stream.attention_mask)
            features, output, total = student.taken()
            wanted = teacher.taken()[2] - (total - output)
            features, wanted = features[stream.tokens][:, dims], wanted[stream.tokens]
            require_finite(stream.teacher[stream.tokens], f"the output of {dense.name}")
            require_finite(features, f"the input of {target.name}")
            require_finite(wanted, f"the output of {target.name}")
            equations.update(features, wanted)
    return tune_projection(equations, weight, ridge)


@torch.no_grad()
def _advance(target: SubLayer, streams: Sequence[Stream]) -> None:
    """Move the student's states past the pruned and tuned sub-layer."""
    for stream in streams:
        stream.student = target.run(stream.student, stream.attention_mask)


def _record_kept(pruned: PreTrainedModel, kept: Sequence[Tensor]) -> None:
    """Note in the config which units of the original model are left."""
    rows = []
    for layer, before in enumerate(kept_units(pruned.config)):
        heads, neurons = kept[2 * layer].tolist(), kept[2 * layer + 1].tolist()
        rows.append(
            KeptUnits(
                tuple(before.heads[index] for index in heads),
                tuple(before.neurons[index] for index in neurons),
            )
        )
    store_kept_units(pruned.config, rows)


def _copy_requires_grad(model: PreTrainedModel, pruned: PreTrainedModel) -> None:
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(trainable[name])


def _report(
    before: SubLayer, after: SubLayer, unit_flops: int, fit: TunedProjection
) -> SubLayerReport:
    def parameters(sublayer: SubLayer) -> int:
        return sum(
            parameter.numel()
            for linear in (*sublayer.inputs, sublayer.output)
            for parameter in linear.parameters()
        )

    return SubLayerReport(
        name=after.name,
        layer=after.layer,
        kind=after.kind,
        units=after.units,
        units_before=before.units,
        flops=after.units * unit_flops,
        flops_before=before.units * unit_flops,
        parameters=parameters(after),
        parameters_before=parameters(before),
        error=fit.error,
    )
