"""Report from the sizes that a pruned model is saved with."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..architectures.table import find_architecture
from ..budget.costs import unit_flops
from ..units.kept import kept_units, store_kept_units
from ..units.sublayers import sublayers
from .making import sublayer_row
from .report import KPruneReport


def report_from_sizes(config: Any, kind: Any, length: int) -> KPruneReport:
    """Returns a report on a pruned model, without reconstruction errors and calibration data.

    Args:
        config: Config of the pruned model. It is compared with the model before its first pruning.
        kind: Class of the pruned model.
        length: Tokens per sequence at which FLOPs are counted.
    """
    kept_units(config)  # before anything is made of a damaged config
    whole = copy.deepcopy(config)
    whole.kprune = None
    store_kept_units(whole, kept_units(whole))
    with torch.device("meta"):
        after, before = kind(config), kind(whole)
    pairs = zip(*(sublayers(m, find_architecture(m)) for m in (before, after)), strict=True)
    rows = tuple(
        sublayer_row(one, other, unit_flops(before, one, length), None) for one, other in pairs
    )
    flops, flops_before = (sum(getattr(r, n) for r in rows) for n in ("flops", "flops_before"))
    return KPruneReport(
        sublayers=rows,
        metric="flops",
        reduction=1 - flops / flops_before,
        budget=float(flops),
        cost=float(flops),
        cost_before=float(flops_before),
        sequence_length=length,
        samples=0,
        tokens=0,
        parameters=after.num_parameters(),
        parameters_before=before.num_parameters(),
    )
