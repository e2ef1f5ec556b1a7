"""What the subcommands of `kprune` do."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from .budget.latency import LatencyTable
from .budget.latency_measurement import measure_latency
from .common.files import check_distinct, check_output_files, check_output_folder, resolved
from .common.text_data import load_rows
from .config import KPruneConfig
from .modeling import classes as modeling
from .modeling.saved_report import load_report
from .pruning import kprune
from .report.report import REPORT_FILE, KPruneReport

if TYPE_CHECKING:
    from .cli import PruneOptions, ReportOptions

AUTO_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
    "embeddings": "AutoModel",
    "image-classification": "AutoModelForImageClassification",
}


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


def run_report(options: ReportOptions) -> KPruneReport:
    """`kprune report`: print the table, and write what was asked for.

    Raises:
        ValueError, OSError, ImportError: an option or file is of no use.
    """
    outputs = {"json": options.json, "plot": options.plot}
    stored = Path(options.source, REPORT_FILE)
    check_output_files(outputs, {"source": str(stored) if stored.is_file() else options.source})
    report = load_report(options.source)
    if options.plot is not None:
        report.plot(options.plot)
    if options.json is not None:
        report.save_json(options.json)
    _print(report)
    return report


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


def load_model(options: PruneOptions, about: Any) -> PreTrainedModel:
    """The model to prune, on its device.

    Raises:
        ValueError: the task cannot be told.
    """
    if options.task in AUTO_CLASSES:
        kind: Any = getattr(transformers, AUTO_CLASSES[options.task])
    else:
        known = (transformers, modeling)  # the latter for models that were pruned before
        written = [
            getattr(module, name)
            for name in about.architectures or []
            for module in known
            if hasattr(module, name)
        ]
        if not written:
            raise ValueError(
                f"The config of {options.model!r} does not tell what the model is for. Pass task: "
                f"one of {', '.join(AUTO_CLASSES)}."
            )
        kind = written[0]
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    spread = {"device_map": "auto"} if device == "auto" else {}
    model = kind.from_pretrained(options.model, dtype=dtype, revision=options.revision, **spread)
    loaded: PreTrainedModel = (model if spread else model.to(device)).eval()
    return loaded


def _check_fields(rows: Any, names: list[str], option: str) -> None:
    missing = [name for name in names if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"The data have no field {missing[0]!r}; their fields are "
            f"{', '.join(rows.column_names)}. Name the right one as {option}."
        )


def _text_batches(
    rows: Any, tokenizer: Any, options: PruneOptions, about: Any
) -> Iterator[dict[str, Any]]:
    names = [options.text_field] if isinstance(options.text_field, str) else options.text_field
    if not 1 <= len(names) <= 2:
        raise ValueError("text_field takes one field, or two for pairs.")
    _check_fields(rows, names, "text_field")
    most = getattr(about, "max_position_embeddings", None) or options.max_length
    length = min(options.max_length, most, tokenizer.model_max_length)

    def batches() -> Iterator[dict[str, Any]]:
        for part in rows.select_columns(names).iter(options.batch_size):
            texts = [list(part[name]) for name in names]
            yield dict(
                tokenizer(
                    *texts, truncation=True, max_length=length, padding=True, return_tensors="pt"
                )
            )

    return batches()


def _image_batches(rows: Any, processor: Any, options: PruneOptions) -> Iterator[dict[str, Any]]:
    _check_fields(rows, [options.image_field], "image_field")

    def batches() -> Iterator[dict[str, Any]]:
        for part in rows.select_columns([options.image_field]).iter(options.batch_size):
            images = [image.convert("RGB") for image in part[options.image_field]]
            yield dict(processor(images, return_tensors="pt"))

    return batches()


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


def _print(report: KPruneReport) -> None:
    # In a file or pipe there is no width to fit into.
    Console(width=None if sys.stdout.isatty() else 120).print(report)
