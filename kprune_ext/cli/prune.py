"""The subcommand `kprune prune`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ..budget.latency import LatencyTable
from ..budget.latency_measurement import measure_latency
from ..command_inputs.inputs import load_all
from ..files.presentation import check_figure
from ..files.writing import (
    check_distinct,
    check_output_files,
    check_output_folder,
    replacing_folder,
    resolved,
)
from ..preparation.config import KPruneConfig
from ..pruning import kprune
from .report import print_report

if TYPE_CHECKING:
    from ..command_inputs.options import CalibratedOptions, PruneOptions
    from ..report.report import KPruneReport


def run_prune(options: PruneOptions) -> PreTrainedModel:
    """Runs `kprune prune`: writes the pruned model, and prints its report.

    Raises:
        ValueError, TypeError, OSError, ImportError: If an option or file is invalid; nothing is
            written then.
    """
    config = prune_config(options)
    _check_paths(options)
    out = resolved(options.output, "output")
    loaded = load_all(options)
    batches = loaded.batches(loaded.rows, options)
    pruned: Any = kprune(
        loaded.model,
        batches,
        config,
        latency=latency_table(options, loaded.model),
        covariances=options.covariances,
    )
    save_all(out, pruned, loaded.processor, options.self_contained)
    print_report(pruned.kprune_report)
    print(f"Wrote {options.output}. Load it {how_to_load(options)}.")
    if options.covariances is not None:
        print(
            f"Wrote {options.covariances}. To start an adapter from it, pass --model {options.output} "
            f"--covariances {options.covariances} and the model's --task to peft-corda init."
        )
    if options.plot is not None:
        _plot(pruned.kprune_report, options.plot, options.output)
    return pruned


def how_to_load(options: CalibratedOptions) -> str:
    """Returns how the saved model is loaded, in words."""
    if options.layout == "uniform":
        return "as usual"
    if options.self_contained:
        return "with trust_remote_code=True, or without it after `import kprune_ext`"
    return "as usual after `import kprune_ext`"


def _check_paths(options: PruneOptions) -> None:
    """Checks that outputs can be written, and overwrite nothing.

    Raises:
        ValueError, OSError, ImportError: If they cannot, or would.
    """
    check_output_folder(options.output, "output")
    inputs = {"model": options.model, "data": options.data}
    files = ("plot", "latency", "covariances")
    check_files(options, inputs, {name: getattr(options, name) for name in files})
    if options.plot is not None:
        check_figure(options.plot)


def check_files(
    options: CalibratedOptions,
    inputs: Mapping[str, str | None],
    files: Mapping[str, str | None],
) -> None:
    """Checks that files can be written, and that neither they nor the folder overwrite anything.

    Raises:
        ValueError, OSError: If they cannot, or would.
    """
    check_output_files(files, inputs)
    check_distinct({"output": options.output}, {**inputs, **files})


def prune_config(options: PruneOptions) -> KPruneConfig:
    """Returns the configuration of `kprune` for the options of the command line.

    Raises:
        ValueError: If an option is out of range.
    """
    return config_removing(options.reduction, options)


def config_removing(reduction: float, options: CalibratedOptions) -> KPruneConfig:
    """Returns the configuration of `kprune` that removes a fraction, otherwise by the options.

    Raises:
        ValueError: If an option is out of range.
    """
    common = {
        name: getattr(options, name)
        for name in ("metric", "max_tokens", "sequence_length", "seed", "layout", "round_to")
    }
    if options.paper:
        return KPruneConfig.paper(reduction, **common)
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
    return KPruneConfig(reduction=reduction, **common, **chosen)


def latency_table(options: CalibratedOptions, model: PreTrainedModel) -> LatencyTable | None:
    """Returns the latency table of the options, which is measured if its file does not exist.

    None without such a file, or if latency is not what is to be reduced.
    """
    if options.metric != "latency" or options.latency is None:
        return None
    path = Path(options.latency)
    if path.exists():
        return LatencyTable.load(path)
    table = measured_table(options, model)
    table.save(path)
    return table


def measured_table(options: CalibratedOptions, model: PreTrainedModel) -> LatencyTable:
    """Returns a latency table that is measured now, by the options."""
    return measure_latency(model, options.batch_size, options.sequence_length or 64)


def _plot(report: KPruneReport, path: str, saved: str) -> None:
    """Writes the figure; the model is on disk by now.

    Raises:
        OSError: If it cannot be written; the message says that the model was.
    """
    try:
        report.plot(path)
    except Exception as error:  # matplotlib has many
        raise OSError(
            f"The model is complete in {saved}, but its figure plot={path!r} could not be written "
            f"({error}). Draw it again with: kprune report {saved} --plot FILE"
        ) from error


def save_all(out: str, pruned: Any, processor: Any, self_contained: bool) -> None:
    """Writes the model with its report and its processor, all of them or none.

    Raises:
        OSError: If they cannot be written, as on a full disk.
    """
    made = [path for path in Path(out).parents if not path.exists()]
    try:
        with replacing_folder(out) as folder:
            pruned.save_pretrained(folder, self_contained=self_contained)
            processor.save_pretrained(folder)
    except Exception as error:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if isinstance(error, OSError) or type(error) is Exception:  # tokenizers raises the latter
            raise OSError(f"Cannot write output={out!r}: {error}") from error
        raise
