"""The subcommand `kprune prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from ..budget.latency import LatencyTable
from ..budget.latency_measurement import measure_latency
from ..common.files import (
    check_distinct,
    check_output_files,
    check_output_folder,
    replacing_folder,
    resolved,
)
from ..common.text_data import load_rows
from ..modeling.classes import model_task
from ..preparation.config import KPruneConfig
from ..pruning import kprune
from ..report.figure import check_figure
from .inputs import check_device, image_batches, language_batches, load_model, text_batches
from .report import print_report

if TYPE_CHECKING:
    from .options import PruneOptions


def run_prune(options: PruneOptions) -> PreTrainedModel:
    """Runs `kprune prune`: writes the pruned model, and prints its report.

    Raises:
        ValueError, TypeError, OSError, ImportError: If an option or file is invalid; nothing is
            written then.
    """
    config = prune_config(options)
    _check_paths(options)
    out = resolved(options.output, "output")
    if options.device is not None and options.device_map is not None:
        raise ValueError("Pass either device or device_map, not both.")
    if min(options.max_length or 1, options.batch_size) < 1 or options.max_length == 0:
        raise ValueError("max_length and batch_size must be at least 1.")
    if options.seed < 0:
        raise ValueError(f"seed={options.seed} is negative. Pass 0 or more.")
    check_device(options.device)
    about = AutoConfig.from_pretrained(options.model, revision=options.revision)
    rows = load_rows(options.data, name=options.data_name, split=options.split)
    rows = rows.shuffle(seed=options.seed)
    model = load_model(options, about)
    if model.main_input_name == "pixel_values":
        processor: Any = AutoImageProcessor.from_pretrained(
            options.model, revision=options.revision
        )
        batches = image_batches(rows, processor, options)
    else:
        processor = AutoTokenizer.from_pretrained(options.model, revision=options.revision)
        is_causal = model_task(model).is_causal
        batches = (language_batches if is_causal else text_batches)(rows, processor, options, about)
    pruned: Any = kprune(model, batches, config, latency=_latency(options, model))
    _save_all(out, pruned, processor, options.plot)
    print_report(pruned.kprune_report)
    needed = "" if config.layout == "uniform" else " after `import kprune_ext`"
    print(f"Wrote {options.output}. Load it as usual{needed}.")
    return pruned


def _check_paths(options: PruneOptions) -> None:
    """Checks that outputs can be written, and overwrite nothing.

    Raises:
        ValueError, OSError, ImportError: If they cannot, or would.
    """
    inputs = {"model": options.model, "data": options.data}
    files: dict[str, str | None] = {"plot": options.plot, "latency": options.latency}
    check_output_folder(options.output, "output")
    check_output_files(files, inputs)
    check_distinct({"output": options.output}, {**inputs, **files})
    if options.plot is not None:
        check_figure(options.plot)


def prune_config(options: PruneOptions) -> KPruneConfig:
    """Returns the configuration of `kprune` for the options of the command line.

    Raises:
        ValueError: If an option is out of range.
    """
    common = {
        name: getattr(options, name)
        for name in ("metric", "max_tokens", "sequence_length", "seed", "layout", "round_to")
    }
    if options.paper:
        return KPruneConfig.paper(options.reduction, **common)
    chosen = {
        name: getattr(options, name)
        for name in (
            "lambda_rep",
            "schedule",
            "score_fraction",
            "ridge",
            "min_share",
            "min_head_share",
        )
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


def _save_all(out: str, pruned: Any, processor: Any, plot: str | None) -> None:
    """Writes the model with its report, its processor and its figure, all of them or none.

    Raises:
        OSError: If they cannot be written, as on a full disk.
    """
    made = [path for path in Path(out).parents if not path.exists()]
    try:
        with replacing_folder(out) as folder:
            pruned.save_pretrained(folder)
            processor.save_pretrained(folder)
            if plot is not None:
                pruned.kprune_report.plot(plot)
    except Exception as error:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if isinstance(error, OSError) or type(error) is Exception:  # tokenizers raises the latter
            raise OSError(f"Cannot write output={out!r}: {error}") from error
        raise
