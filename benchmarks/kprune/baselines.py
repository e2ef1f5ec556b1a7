"""The baselines of K-prune, written for comparison: magnitude, and a Fisher mask.

Both choose all units at once, from the dense model, under the same budget of FLOPs.

- `magnitude` ranks units by the squared norm of their weights (all projections), and tunes nothing.
- `fisher_mask` follows Kwon et al. (arXiv 2204.09656): units are ranked by the Fisher information of
  their masks, and every kept unit is rescaled by one number, so that the output of each sub-layer,
  bottom-up, comes closest to the dense one's. The Fisher information is the expected one, which needs
  no labels. The rearrangement of masks within layers is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kprune_ext import KPruneConfig
from kprune_ext.architectures.table import find_architecture
from kprune_ext.architectures.tasks import problem_type
from kprune_ext.budget.costs import budget_for, cost_tables
from kprune_ext.budget.search import search_masks
from kprune_ext.calibration.state_memory import StateMemory
from kprune_ext.calibration.streams import Stream, start_streams
from kprune_ext.knowledge.measure import measure_knowledge
from kprune_ext.knowledge.signal import Signal
from kprune_ext.model_layers.hooks import watching
from kprune_ext.model_layers.layer_stack import LayerStack
from kprune_ext.modeling.classes import model_task
from kprune_ext.modeling.copying import record_kept, uneven_copy
from kprune_ext.samples.sharing import shared_data
from kprune_ext.tuning.least_squares import NormalEquations
from kprune_ext.units.sublayers import SubLayer, sublayers
from kprune_ext.units.surgery import set_output, shrink

Baseline = Literal["magnitude", "fisher_mask"]


def prune_by(
    kind: Baseline, model: PreTrainedModel, batches: Iterable[Any], config: KPruneConfig
) -> tuple[PreTrainedModel, float]:
    """The pruned model, and the share of encoder FLOPs that it keeps."""
    architecture, task = find_architecture(model), model_task(model)
    config = config.meant_for(is_causal=False, next_tokens=False)
    data = shared_data(
        model,
        batches,
        max_tokens=config.max_tokens,
        seed=config.seed,
        scored=(config.score_fraction, config.min_score_samples),
    )
    length = round(data.tokens / data.count)
    pruned: Any = uneven_copy(model).requires_grad_(False)
    dense, student = (sublayers(m, architecture) for m in (model, pruned))
    costs = cost_tables(model, dense, "flops", length, None)
    stack = LayerStack(pruned, architecture)
    streams: list[Stream] = []
    if kind == "magnitude":
        scores = [_squared_norms(sublayer) for sublayer in student]
    else:
        streams = start_streams(stack, data, config.batch_tokens, StateMemory(2**40, Path()))
        signal = Signal(task.predict, problem_type(model, task), 1.0, config.max_score_passes)
        scored = [stream for stream in streams if stream.scored]
        found = measure_knowledge(student, stack, scored, signal)
        scores = [knowledge.predictive for knowledge in found]
    kept = []
    masks = search_masks(scores, costs, budget_for(costs, config.reduction))
    for before, target, mask in zip(dense, student, masks, strict=True):
        kept.append(mask.nonzero().flatten().tolist())
        shrink(target, kept[-1])
        if streams:
            _rescale(before, target, stack, streams)
    record_kept(pruned, zip(kept[::2], kept[1::2], strict=True))
    spent = sum(float(table[len(units)]) for table, units in zip(costs, kept, strict=True))
    return pruned, spent / sum(float(table[-1]) for table in costs)


def _squared_norms(sublayer: SubLayer) -> Tensor:
    total = sublayer.output.weight.detach().double().square().sum(0)
    for linear in sublayer.inputs:
        rows = linear.weight.detach().double().square().sum(1)
        total = total + rows.reshape(sublayer.paths.stacked, -1).sum(0)
    return total.reshape(-1, sublayer.unit_size).sum(1)


@torch.no_grad()
def _rescale(
    dense: SubLayer, target: SubLayer, stack: LayerStack, streams: Sequence[Stream]
) -> None:
    """Fit one factor per kept unit by least squares, and run both models' states past the sub-layer."""
    weight = target.output.weight.detach().double()
    equations = NormalEquations.zeros(weight.shape[1], len(weight))
    bias = target.output.bias
    with watching(dense) as teacher, watching(target) as student:
        for stream in streams:
            context, tokens = stream.contexts_in(stack)[target.layer], stream.tokens
            after = dense.run(stream.teacher, context)
            target.run(stream.student, context)
            difference = stream.teacher - stream.student
            wanted = (teacher.taken()[1] + difference)[tokens] - (0 if bias is None else bias)
            equations.update(student.taken()[0][tokens], wanted)
            stream.teacher.copy_(after)
    if target.units:
        factors = unit_factors(equations, weight, target.unit_size)
        spread = factors.repeat_interleave(target.unit_size)
        set_output(target, weight * spread, None)
    for stream in streams:
        contexts = stream.contexts_in(stack)
        stream.student.copy_(target.run(stream.student, contexts[target.layer]))


def unit_factors(equations: NormalEquations, weight: Tensor, unit_size: int) -> Tensor:
    """Factors s `(units,)` that minimise Σ ‖Σ_u s_u W_u f_u − y‖², with a slight pull towards 1."""
    units = weight.shape[1] // unit_size
    products = equations.gram * (weight.T @ weight)
    gram = products.reshape(units, unit_size, units, unit_size).sum((1, 3))
    cross = (weight.T * equations.cross).sum(1).reshape(units, unit_size).sum(1)
    ridge = 1e-3 * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(units, dtype=gram.dtype)
    change = torch.linalg.solve(gram + ridge, cross - gram.sum(1))
    return (1 + change).clamp(-10, 10)
