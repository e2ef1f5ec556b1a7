"""Report on a model that was pruned earlier, from its checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from ..architectures.table import ROWS
from ..checkpoint_files.loading import fitting_report, readable_report, stored_report
from ..report.from_sizes import report_from_sizes
from ..report.report import REPORT_FILE, KPruneReport
from .classes import KIND_OF_NAME, UnevenLayers


def load_report(
    source: PreTrainedModel | str | os.PathLike[str], sequence_length: int = 128
) -> KPruneReport:
    """Returns the report on a pruned model.

    It is the report of the pruning run if that is stored with the model and is not damaged. Otherwise it
    is made from the sizes in the config: reconstruction errors and calibration data are unknown then,
    and the model is compared with the one before its first pruning.

    Args:
        source: A pruned model, its folder or hub id, or a report file; weights are not read.
        sequence_length: Tokens per sequence at which FLOPs are counted, if no report is stored.

    Raises:
        ValueError: If the model was not pruned by kprune_ext, or its config is damaged.
        OSError: If the folder, file or repository does not exist.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} is too small. Pass 1 or more.")
    if isinstance(source, PreTrainedModel):
        stored = getattr(source, "kprune_report", None)
        return stored or _from_sizes(source.config, type(source), sequence_length)
    path = Path(source)
    if path.is_file():
        return KPruneReport.load_json(path)
    stored = stored_report(source, {})
    is_alone = path.is_dir() and not (path / "config.json").is_file()
    if stored is not None and is_alone:
        return stored
    try:
        config = AutoConfig.from_pretrained(source)
    except RecursionError:
        raise ValueError(
            f"config.json in {os.fspath(source)!r} is nested too deeply. Restore it from the pruned "
            "checkpoint."
        ) from None
    names = [name for name in config.architectures or [] if name in KIND_OF_NAME]
    if stored is not None:
        # The config of layers of equal size does not say that it is about a pruned model.
        fits = bool(names) or (
            config.model_type in ROWS and fitting_report(config, stored) is not None
        )
        if fits:
            return stored
    return _from_sizes(config, KIND_OF_NAME[names[0]] if names else None, sequence_length)


def report_beside(model: PreTrainedModel) -> KPruneReport | None:
    """Returns the report in the local folder that a model was loaded from, if it describes the model."""
    path = Path(getattr(model, "name_or_path", "") or "", REPORT_FILE)
    if model.config.model_type not in ROWS or not path.is_file():
        return None
    return fitting_report(model.config, readable_report(path))


def _from_sizes(config: Any, kind: Any, length: int) -> KPruneReport:
    if kind is None or not issubclass(kind, UnevenLayers):
        raise ValueError(
            f"Cannot report on this {config.model_type!r} model: it was not pruned by kprune_ext, or "
            "to layers of equal size, which only its report tells. Pass the folder of a pruned model "
            f"with its {REPORT_FILE}, or that file."
        )
    return report_from_sizes(config, kind, length)
