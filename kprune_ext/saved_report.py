"""A report on a model that was pruned earlier, from what is saved with it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from .architectures.table import find_architecture
from .budget.costs import unit_flops
from .modeling import KIND_OF_NAME, UnevenLayers, kept_units
from .report import REPORT_FILE, KPruneReport
from .reporting import sublayer_row
from .units.kept import store_kept_units
from .units.sublayers import sublayers


def load_report(
    source: PreTrainedModel | str | os.PathLike[str], sequence_length: int = 128
) -> KPruneReport:
    """What a pruned model keeps of the original one.

    That is the report of the pruning run where it is stored with the model; otherwise one made from
    the sizes in the config, in which reconstruction errors and calibration data are unknown, and
    the original is the model before its first pruning.

    Args:
        source: a pruned model, or the folder or hub id of one; weights are not read.
        sequence_length: tokens per sequence at which FLOPs are counted, where it is made anew.

    Raises:
        ValueError: the model was not pruned by kprune_ext, or its config is damaged.
        OSError: there is no such folder, file or repository.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} is too small. Pass 1 or more.")
    if isinstance(source, PreTrainedModel):
        stored = getattr(source, "kprune_report", None)
        return stored or _from_config(source.config, type(source), sequence_length)
    path = Path(source)
    if path.is_file():
        return KPruneReport.load_json(path)
    if (path / REPORT_FILE).is_file():
        return KPruneReport.load_json(path / REPORT_FILE)
    config = AutoConfig.from_pretrained(source)
    names = [name for name in config.architectures or [] if name in KIND_OF_NAME]
    return _from_config(config, KIND_OF_NAME[names[0]] if names else None, sequence_length)


def _from_config(config: Any, kind: Any, length: int) -> KPruneReport:
    if kind is None or not issubclass(kind, UnevenLayers):
        raise ValueError(
            f"There is nothing to report on: this {config.model_type!r} model was not pruned by "
            "kprune_ext. Pass the folder of a pruned model, or its kprune_report.json."
        )
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
