"""K-prune (arXiv 2308.03449): knowledge-preserving pruning without retraining."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from .architectures.tasks import Predict
from .budget.costs import unit_flops
from .budget.latency import LatencyTable
from .budget.search import search_masks
from .calibration.device_map import dispatch
from .common.memory import trim_memory
from .common.placement import is_offloaded
from .config import KPruneConfig
from .knowledge.measure import measure_knowledge
from .knowledge.scores import unit_scores
from .modeling.copying import record_kept
from .preparation import PruningRun, prepared
from .progress import progress_over
from .report.making import make_report
from .tuning.least_squares import TunedProjection
from .tuning.logit_scale import scale_logits
from .tuning.projection import fit_projection, normal_equations
from .units.sublayers import SubLayer
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
    with prepared(
        model, dataloader, config, predict=predict, latency=latency, accelerator=accelerator
    ) as run:
        outcome = _prune(run, config, progress)
        if config.scale_logits:
            signal = run.signal
            outcome.logit_scale = scale_logits(
                run.stack, run.streams, signal.predict, signal.problem, run.processes
            )
    return _finished(run, outcome, config)


@dataclass
class _Outcome:
    """What the loop leaves behind.

    Attributes:
        kept: Per sub-layer, the numbers of the units kept.
        errors: Per sub-layer, the relative error of the fit.
        logit_scale: What all logits were multiplied by, if anything.
    """

    kept: list[list[int]] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    logit_scale: float | None = None


def _prune(run: PruningRun, config: KPruneConfig, progress: bool) -> _Outcome:
    """Prune the sub-layers bottom-up (algorithm 1); the student is changed in place."""
    outcome, left = _Outcome(), run.budget.limit
    scores: list[Tensor] = []
    original = run.teacher[0]
    silent = not (progress and run.processes.is_main)
    for step in progress_over(run.student, config.schedule, disable=silent):
        target = run.student[step]
        if target.kind == "attention" or config.schedule == "per_sublayer":
            scores = _measure(run, step, config)
        keep = _search(run, step, scores, left)
        original = _original(run.teacher[step], target, original)
        shrink(target, keep)
        fit = _tune(run, original, target, config)
        set_output(target, fit.weight, fit.bias)
        _advance(run, target)
        left -= float(run.budget.costs[step][len(keep)])
        scores = scores[1:]
        outcome.kept.append(keep)
        outcome.errors.append(fit.error)
        del fit  # before the next step's
        trim_memory()
    return outcome


def _measure(run: PruningRun, step: int, config: KPruneConfig) -> list[Tensor]:
    """Step 1: scores of the units of this sub-layer and of all later ones."""
    targets = run.student[step:]
    knowledge = measure_knowledge(targets, run.stack, run.scored, run.signal, run.processes)
    trim_memory()  # blocks of many sizes, else kept by the process in ever more pieces
    return unit_scores(
        targets,
        knowledge,
        lambda_rep=config.lambda_rep,
        relative=config.lambda_scale == "relative",
        prior_samples=config.prior_samples,
        mu=config.mu,
    )


def _search(run: PruningRun, step: int, scores: Sequence[Tensor], left: float) -> list[int]:
    """Step 2: the units of this sub-layer that one global threshold keeps."""
    budget = run.budget
    masks = search_masks(scores, budget.costs[step:], left, budget.least[step:])
    return run.processes.gather(masks[0].nonzero().flatten().tolist())[0]


def _tune(
    run: PruningRun, original: SubLayer, target: SubLayer, config: KPruneConfig
) -> TunedProjection:
    """Step 3: the fit of what stays to the teacher, whose states move past this sub-layer."""
    with run.processes.error_barrier():
        equations = normal_equations(
            original,
            target,
            run.stack,
            run.streams,
            unread_weight=config.unread_weight if run.is_last_layer(target) else 1.0,
            halves=config.ridge is None,
        )
    return fit_projection(
        target, equations, run.processes, ridge=config.ridge, tune_bias=config.tune_bias
    )


@torch.no_grad()
def _advance(run: PruningRun, target: SubLayer) -> None:
    """Move the student's states past the pruned and tuned sub-layer."""
    with run.processes.error_barrier():
        for stream in run.streams:
            context = stream.contexts_in(run.stack)[target.layer]
            stream.student.copy_(target.run(stream.student, context))


def _original(dense: SubLayer, target: SubLayer, before: SubLayer) -> SubLayer:
    """The teacher's sub-layer, with weights that need not be brought in for every batch.

    Where the teacher's are offloaded, it lies in a copy of the student's layer, made before any of
    that was pruned.

    Args:
        dense: Of the teacher.
        target: Of the student, at the same place.
        before: What this function gave for the sub-layer before.
    """
    if target.kind != "attention":
        return replace(dense, module=before.module)
    return replace(dense, module=deepcopy(target.module)) if is_offloaded(dense.module) else dense


def _finished(run: PruningRun, outcome: _Outcome, config: KPruneConfig) -> PreTrainedModel:
    """The pruned model, with its record and report."""
    kept, budget = outcome.kept, run.budget
    record_kept(run.pruned, zip(kept[::2], kept[1::2], strict=True))
    _copy_requires_grad(run.model, run.pruned)
    pruned: Any = dispatch(run.pruned, run.device_map)
    flops = [unit_flops(run.model, sublayer, budget.length) for sublayer in run.teacher]
    pruned.kprune_report = make_report(
        run.model,
        pruned,
        zip(run.teacher, run.student, flops, outcome.errors, strict=True),
        metric=config.metric,
        reduction=config.reduction,
        costs=budget.costs,
        budget=budget.limit,
        length=budget.length,
        samples=run.data.count,
        tokens=run.data.tokens,
        logit_scale=outcome.logit_scale,
    )
    return pruned


def _copy_requires_grad(model: PreTrainedModel, pruned: PreTrainedModel) -> None:
    # Tied parameters, too: on two devices they part.
    every = model.named_parameters(remove_duplicate=False)
    trainable = {name: parameter.requires_grad for name, parameter in every}
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(trainable[name])
