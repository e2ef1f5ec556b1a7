"""Report of a pruning run from the run's result."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from ..units.kept import KeptUnits, encode_indices
from ..units.sublayers import SubLayer
from .quality import Quality, Speed
from .report import KPruneReport
from .rows import SubLayerReport


@dataclass(frozen=True)
class HeldOut:
    """Loss of a language model on tokens that are held out.

    Attributes:
        loss: Mean loss, in nats a token.
        tokens: Number of tokens.
    """

    loss: float
    tokens: int


def make_report(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    rows: Iterable[tuple[SubLayer, SubLayer, int, float]],
    *,
    metric: str,
    reduction: float,
    costs: Sequence[Tensor],
    budget: float,
    length: int,
    samples: int,
    tokens: int,
    logit_scale: float | None,
    losses: tuple[HeldOut | None, HeldOut | None] = (None, None),
    quality: Quality | None = None,
    speed: Speed | None = None,
    kept: Sequence[KeptUnits] | None = None,
) -> KPruneReport:
    """Returns the report of a run.

    Args:
        model, pruned: The model before and after pruning.
        rows: The sub-layer before and after, the FLOPs of a unit, and the relative error of the fit,
            per sub-layer.
        metric: Quantity that the budget limits.
        reduction: Fraction of it that was to be removed.
        costs: Cost of keeping 0, 1, … units in the run's metric, per sub-layer.
        budget: Largest total cost of the kept units.
        length: Tokens per sequence at which FLOPs are counted.
        samples, tokens: Amount of calibration data used.
        logit_scale: The factor from `kprune_ext.tuning.logit_scale.scale_logits`.
        losses: Losses of the model before and after on held-out tokens.
        quality: Agreement with the original, and accuracy.
        speed: Time of a forward pass of both models.
        kept: The units of each layer, where the pruned model's config does not list them.
    """
    old, new = losses
    rows = list(rows)
    sublayers = tuple(
        sublayer_row(before, after, flops, error) for before, after, flops, error in rows
    )
    if kept is not None:
        units = [numbers for layer in kept for numbers in (layer.heads, layer.neurons)]
        sublayers = tuple(
            replace(row, kept=encode_indices(numbers))
            for row, numbers in zip(sublayers, units, strict=True)
        )
    return KPruneReport(
        sublayers=sublayers,
        metric=metric,
        reduction=reduction,
        budget=budget,
        cost=sum(float(t[row.units]) for t, row in zip(costs, sublayers, strict=True)),
        cost_before=sum(float(table[-1]) for table in costs),
        sequence_length=length,
        samples=samples,
        tokens=tokens,
        parameters=pruned.num_parameters(),
        parameters_before=model.num_parameters(),
        logit_scale=logit_scale,
        perplexity=None if new is None else perplexity(new.loss),
        perplexity_before=None if old is None else perplexity(old.loss),
        held_out_tokens=0 if old is None else old.tokens,
        weight_bytes=weight_bytes(pruned),
        weight_bytes_before=weight_bytes(model),
        quality=quality,
        speed=speed,
        widest=max(before.width for before, *_ in rows),
        original=_original(model),
    )


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one of the hub, and no path, which means nothing elsewhere."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not os.path.exists(name)


def _original(model: PreTrainedModel) -> str | None:
    """Returns the hub id of a model, of the first one if it was pruned several times."""
    before = getattr(model, "kprune_report", None)
    name = str(getattr(model, "name_or_path", None) or "")
    return before.original if before is not None else name if is_hub_id(name) else None


def weight_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes of a model's weights, in their dtype; tied weights count once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def perplexity(loss: float) -> float:
    """Returns the exponential of a loss in nats; that of a ruined model has an upper limit."""
    return math.exp(min(loss, 60.0))


def sublayer_row(
    before: SubLayer, after: SubLayer, unit_flops: int, error: float | None
) -> SubLayerReport:
    """Returns the row of one sub-layer.

    Args:
        before, after: The sub-layer of the two models.
        unit_flops: FLOPs of one of its units, per sequence.
        error: Relative reconstruction error, if known.
    """
    return SubLayerReport(
        name=after.name,
        layer=after.layer,
        kind=after.kind,
        units=after.units,
        units_before=before.units,
        flops=after.units * unit_flops,
        flops_before=before.units * unit_flops,
        parameters=after.parameters,
        parameters_before=before.parameters,
        error=error,
        query_heads=before.queries,
    )
