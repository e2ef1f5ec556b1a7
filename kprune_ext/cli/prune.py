"""What the subcommands of `kprune` do."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from ..budget.latency import LatencyTable
from ..budget.latency_measurement import measure_latency
from ..common.files import check_distinct, check_output_files, check_output_folder, resolved
from ..common.text_data import load_rows
from ..config import KPruneConfig
from ..pruning import kprune
from ..report.report import REPORT_FILE, KPruneReport
from .inputs import _image_batches, _text_batches, load_model
from .report import _print

if TYPE_CHECKING:
    from .options import PruneOptions


def run_prune(options: PruneOptions) -> PreTrainedModel:
    """`kprune prune`: write the pruned model, and print its report.

    Raises:
        ValueError, TypeError, OSError, ImportError: an option or file is of no use; nothing is
            written then.
    """
    config = prune_config(options)
    _check_paths(options)
    out = Path(resolved(options.out, "out"))
    if min(options.max_length, options.batch_size) < 1:
        raise ValueError("max_length and batch_size must be at least 1.")
    about = AutoConfig.from_pretrained(options.model, revision=options.revision)
    rows = load_rows(options.data, name=options.data_name, split=options.split)
    rows = rows.shuffle(seed=options.seed)
    model = load_model(options, about)
    if model.main_input_name == "pixel_values":
        processor: Any = AutoImageProcessor.from_pretrained(
            options.model, revision=options.revision
        )
        batches = _image_batches(rows, processor, options)
    else:
        processor = AutoTokenizer.from_pretrained(options.model, revision=options.revision)
        batches = _text_batches(rows, processor, options, about)
    pruned: Any = kprune(model, batches, config, latency=_latency(options, model))
    _save_all(out, pruned, processor, pruned.kprune_report, options.plot)
    _print(pruned.kprune_report)
    print(f"Wrote {options.out}. Load it as usual after `import kprune_ext`.")
    return pruned


def _check_paths(options: PruneOptions) -> None:
    """Raise ValueError or OSError if an output cannot be written, or would overwrite something."""
    inputs = {"model": options.model, "data": options.data}
    files: dict[str, str | None] = {"plot": options.plot, "latency": options.latency}
    check_output_folder(options.out, "out")
    check_output_files(files, inputs)
    check_distinct({"out": options.out}, {**inputs, **files})


def prune_config(options: PruneOptions) -> KPruneConfig:
    """The engine's options that the command line's stand for.

    Raises:
        ValueError: one is out of range.
    """
    common = {
        name: getattr(options, name) for name in ("metric", "max_tokens", "sequence_length", "seed")
    }
    if options.paper:
        return KPruneConfig.paper(options.reduction, **common)
    chosen = {
        name: getattr(options, name)
        for name in ("lambda_rep", "schedule", "score_fraction", "ridge")
        if getattr(options, name) is not None
    }
    return KPruneConfig(reduction=options.reduction, **common, **chosen)


def _latency(options: PruneOptions, model: PreTrainedModel) -> LatencyTable | None:
    if options.metric != "latency" or options.latency is None:
        return None
    path = Path(options.latency)
    if path.exists():
        return LatencyTable.load(path)
    length = options.sequence_length or 64
    table = measure_latency(model, options.batch_size, length)
    table.save(path)
    return table


def _save_all(
    out: Path, pruned: Any, processor: Any, report: KPruneReport, plot: str | None
) -> None:
    """Write all files into a folder beside, which takes the name ``out`` once it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        pruned.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        report.save_json(unfinished / REPORT_FILE)
        if plot is not None:
            report.plot(plot)
        if out.exists():
            out.rmdir()
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
