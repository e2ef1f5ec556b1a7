"""Baselines for pruning decoders without training: FLAP, Wanda-sp and magnitude.

All remove key-value groups and gated neurons under one budget of parameters. Where the published
methods judge query heads, they judge whole groups here: FLAP's own program knows only models in which
every query head has a key and a value of its own, and there a head is removed together with both.

- `flap` (An et al., arXiv 2312.11983): how much each input channel of an output projection varies,
  times the squared norm of the channel's weights, standardised within each layer and kind, and compared
  by one threshold in all layers. The mean output of what is removed is added as a bias. As in the
  published program, the metric of attention is squared, channels are standardised, and those of a unit
  are averaged. `flap_units` sums the channels of a unit before, and standardises units. With few
  units a layer that sets the worst of them far apart in every layer, whatever it is worth, and it is
  much worse; the first is the baseline that counts.
- `wanda_sp` (the structured form of Wanda in FLAP's study): |W| times the norm of the input channel,
  averaged over the outputs and summed per unit; every layer loses the same share. Layers are judged
  bottom-up, on the outputs of the pruned layers below.
- `magnitude`: squared norm of all weights of a unit; every layer loses the same share.

Shapes: channels are those of an output projection's input, `(units * unit_size,)`; scores and masks of
units are `(units,)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .decoder_units import Batch, Kind, SubLayer, Walk, sublayers

Criterion = Callable[[Tensor, Tensor, int, Kind], Tensor]


@dataclass(frozen=True)
class Moments:
    """Statistics of channels over tokens, each `(channels,)` in float64.

    Attributes:
        mean: Mean.
        square: Mean square.
    """

    mean: Tensor
    square: Tensor

    @property
    def variance(self) -> Tensor:
        """Mean squared deviation from the mean."""
        return (self.square - self.mean.square()).clamp(min=0)


def moments(features: Iterable[Tensor], tokens: Sequence[Tensor]) -> Moments:
    """Mean and mean square of features over the tokens that are no padding."""
    total: Tensor | float = 0.0
    square: Tensor | float = 0.0
    count = 0
    for found, mask in zip(features, tokens, strict=True):
        rows = found[mask].double()
        total, square = total + rows.sum(0), square + rows.square().sum(0)
        count += len(rows)
    if not isinstance(total, Tensor) or not isinstance(square, Tensor) or not count:
        raise ValueError("There is no token to take statistics of.")
    return Moments(total / count, square / count)


def per_unit(channels: Tensor, unit_size: int) -> Tensor:
    """Sums over the channels of each unit."""
    return channels.reshape(-1, unit_size).sum(1)


def flap_scores(variance: Tensor, weight: Tensor, unit_size: int, kind: Kind) -> Tensor:
    """Fluctuation times squared column norm, standardised over channels, then averaged per unit.

    Args:
        variance: Variance of the channels.
        weight: Weight of the output projection, `(outputs, channels)`.
        unit_size: Channels per unit.
        kind: Kind of the sub-layer; the metric of attention is squared first.
    """
    channels = variance * weight.double().square().sum(0)
    channels = channels.square() if kind == "attention" else channels
    return per_unit(standardised(channels), unit_size) / unit_size


def flap_unit_scores(variance: Tensor, weight: Tensor, unit_size: int, kind: Kind) -> Tensor:
    """Fluctuation times squared column norm, summed per unit, then standardised over units."""
    return standardised(per_unit(variance * weight.double().square().sum(0), unit_size))


def standardised(values: Tensor) -> Tensor:
    """Values with mean 0 and deviation 1; zeros where there is nothing to compare."""
    if len(values) < 2 or not values.std() > 0:
        return torch.zeros_like(values)
    return (values - values.mean()) / values.std()


def wanda_scores(square: Tensor, weight: Tensor, unit_size: int) -> Tensor:
    """|W| times the root mean square of its channel, averaged over the outputs, summed per unit."""
    return per_unit((weight.double().abs() * square.sqrt()).mean(0), unit_size)


def magnitude_scores(sublayer: SubLayer) -> Tensor:
    """Squared norm of all weights of each unit."""
    total = sublayer.output.weight.detach().double().square().sum(0)
    scores = per_unit(total, sublayer.unit_size)
    for linear in sublayer.inputs:
        rows = linear.weight.detach().double().square().sum(1)
        scores = scores + rows.reshape(sublayer.units, -1).sum(1)
    return scores


def global_masks(scores: Sequence[Tensor], costs: Sequence[int], reduction: float) -> list[Tensor]:
    """The units with the highest scores whose cost fits the budget, by one threshold.

    Args:
        scores: Scores of the units, per sub-layer.
        costs: Parameters of one unit, per sub-layer.
        reduction: Share of the cost of all units to remove, at least.
    """
    values = torch.cat(list(scores)).cpu()
    every = [torch.full((len(s),), c) for s, c in zip(scores, costs, strict=True)]
    weights = torch.cat(every).double()
    order = values.argsort(descending=True, stable=True)
    fits = weights[order].cumsum(0) <= (1 - reduction) * weights.sum() * (1 + 1e-12)
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[order[fits]] = True
    return list(keep.split([len(s) for s in scores]))


def uniform_sizes(layers: Sequence[SubLayer], reduction: float) -> tuple[int, int]:
    """The numbers of groups and neurons that every layer keeps.

    Groups lose the share asked for, rounded to whole groups, at least one stays, and they take no more
    than the whole layer is to lose. Neurons make up the rest.
    """
    attention, mlp = layers[:2]
    whole = attention.units * attention.cost + mlp.units * mlp.cost
    removed = min(attention.units - 1, int(reduction * attention.units + 0.5))
    removed = min(removed, int(reduction * whole // attention.cost))
    groups = attention.units - removed
    left = (1 - reduction) * whole * (1 + 1e-12) - groups * attention.cost
    return groups, max(0, min(mlp.units, int(left // mlp.cost)))


def best(scores: Tensor, count: int) -> Tensor:
    """The mask of the units with the highest scores."""
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[scores.cpu().argsort(descending=True, stable=True)[:count]] = True
    return keep


@torch.no_grad()
def flap_choice(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    reduction: float,
    criterion: Criterion = flap_scores,
) -> tuple[list[Tensor], list[Tensor]]:
    """FLAP's masks, and the mean of the channels of each output projection."""
    layers = sublayers(model)
    walk, scores, means = Walk.start(model, batches), [], []
    for number, sublayer in enumerate(layers):
        features = walk.features(number, sublayer)
        found = moments(features, walk.tokens)
        weight = sublayer.output.weight.detach()
        scores.append(criterion(found.variance, weight, sublayer.unit_size, sublayer.kind))
        means.append(found.mean)
        walk.advance(sublayer, features)
    return global_masks(scores, [s.cost for s in layers], reduction), means


@torch.no_grad()
def prune_by_flap(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    reduction: float,
    criterion: Criterion = flap_scores,
) -> list[Tensor]:
    """Removes by FLAP what it judges to vary least, with its bias; returns the masks."""
    masks, means = flap_choice(model, batches, reduction, criterion)
    for sublayer, keep, mean in zip(sublayers(model), masks, means, strict=True):
        weight = sublayer.output.weight.detach().double()
        removed = torch.where(sublayer.columns(keep), 0, mean)
        sublayer.remove(keep, weight @ removed)
    return masks


@torch.no_grad()
def prune_by_wanda(
    model: PreTrainedModel, batches: Sequence[Batch], reduction: float
) -> list[Tensor]:
    """Removes by Wanda-sp the same share of every layer, bottom-up; returns the masks."""
    layers = sublayers(model)
    sizes = uniform_sizes(layers, reduction)
    walk, masks = Walk.start(model, batches), []
    for number, sublayer in enumerate(layers):
        features = walk.features(number, sublayer)
        found = moments(features, walk.tokens)
        scores = wanda_scores(found.square, sublayer.output.weight.detach(), sublayer.unit_size)
        masks.append(best(scores, sizes[number % 2]))
        sublayer.remove(masks[-1])
        walk.advance(sublayer, features)
    return masks


def prune_by_magnitude(model: PreTrainedModel, reduction: float) -> list[Tensor]:
    """Removes the same share of every layer, by the norm of the weights; returns the masks."""
    layers = sublayers(model)
    sizes = uniform_sizes(layers, reduction)
    masks = [best(magnitude_scores(s), sizes[number % 2]) for number, s in enumerate(layers)]
    for sublayer, keep in zip(layers, masks, strict=True):
        sublayer.remove(keep)
    return masks


def share_kept(model: PreTrainedModel, masks: Sequence[Tensor]) -> float:
    """Share of the parameters of all units that stay."""
    layers = sublayers(model)
    kept = sum(s.cost * int(keep.sum()) for s, keep in zip(layers, masks, strict=True))
    return kept / sum(s.cost * s.units for s in layers)
