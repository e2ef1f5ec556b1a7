"""Fits of a decoder's output projections once it is known which units stay.

- `refit_locally`: what stays is fitted, by least squares, to the same layer's own dense output, from
  the dense model's activations (the step of MoDeGPT for MLPs, Lin et al., arXiv 2408.09632; here for
  attention, too).
- `tune_by_engine`: what stays is fitted as K-prune fits it, bottom-up, to the dense model's residual
  stream.

Both choose the ridge by held-out halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kprune_ext import KPruneConfig
from kprune_ext.modeling.copying import record_kept
from kprune_ext.preparation.run import prepared
from kprune_ext.pruning import prune_sublayers
from kprune_ext.tuning.least_squares import NormalEquations, choose_ridge, tune_projection

from .decoder_units import Batch, SubLayer, Walk, sublayers


def tune_by_engine(
    model: PreTrainedModel, batches: Sequence[Batch], masks: Sequence[Tensor], config: KPruneConfig
) -> Any:
    """A copy of the model without some of its units, the others tuned as K-prune does."""
    keep = [mask.nonzero().flatten().tolist() for mask in masks]
    with prepared(model, batches, config) as run:
        prune_sublayers(run, keep=keep)
        record_kept(run.pruned, zip(keep[::2], keep[1::2], strict=True))
        return run.whole


@torch.no_grad()
def refit_locally(
    model: PreTrainedModel, batches: Sequence[Batch], masks: Sequence[Tensor]
) -> None:
    """Removes units, and fits the others to each layer's own dense output."""
    walk = Walk.start(model, batches)
    for number, (sublayer, keep) in enumerate(zip(sublayers(model), masks, strict=True)):
        found = walk.features(number, sublayer)
        wanted = [sublayer.output(x) for x in found]
        walk.advance(sublayer, found)
        _fit(sublayer, keep, walk.tokens, found, wanted)


def _fit(
    sublayer: SubLayer,
    keep: Tensor,
    tokens: Sequence[Tensor],
    features: Sequence[Tensor],
    wanted: Sequence[Tensor],
) -> None:
    """Fits the columns of the units that stay, and sets all others to zero."""
    output, columns = sublayer.output, sublayer.columns(keep)
    weight = output.weight.detach()[:, columns]
    device, count = weight.device, int(columns.sum())
    halves = tuple(NormalEquations.zeros(count, len(weight), device) for _ in range(2))
    first = 0
    for mask, x, y in zip(tokens, features, wanted, strict=True):
        # Every second sample, as the tokens of a sample resemble one another.
        side = (torch.arange(first, first + len(x), device=device) % 2).unsqueeze(1)
        first += len(x)
        for half, equations in enumerate(halves):
            chosen = mask & (side == half)
            if bool(chosen.any()):
                equations.update(x[chosen][:, columns], y[chosen])
    fixed = weight.new_zeros(len(weight)) if output.bias is None else output.bias.detach()
    ridge = choose_ridge((halves[0], halves[1]), weight, fixed)
    fit = tune_projection(halves[0].plus(halves[1]), weight, ridge, fixed)
    output.weight.zero_()
    output.weight[:, columns] = fit.weight.to(output.weight.dtype)
