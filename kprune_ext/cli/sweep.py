"""The subcommand `kprune sweep`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from ..budget.costs import UnreachableError
from ..budget.latency import LatencyTable
from ..budget.latency_measurement import device_name, model_seconds
from ..budget_search import checked_search
from ..command_inputs.inputs import Loaded, load_all, load_model
from ..command_inputs.scoring import Scoring, rows_to_score, scoring_for
from ..common.fingerprints import config_of, weights_of
from ..evaluation.frontier import Frontier, Point
from ..files.writing import check_output_folder, replacing, write_json
from ..modeling.saved_report import load_report
from ..pruning import kprune
from .prune import check_files, config_removing, how_to_load, save_all
from .search import calibrated_on, calibration, inputs_of, table_for_all

if TYPE_CHECKING:
    from ..command_inputs.search_options import SweepOptions

#: File of a sweep's results; the same name has the table as Markdown, and the figure.
RESULTS = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """What all sizes of a sweep have in common.

    Attributes:
        options: Options of the command.
        loaded: The model, and what it is pruned with.
        scoring: How models are scored.
        latency: Latency table, if latency is what is to be reduced.
        about: What identifies the sweep, as plain values.
    """

    options: SweepOptions
    loaded: Loaded
    scoring: Scoring
    latency: LatencyTable | None
    about: dict[str, Any]


def run_sweep(options: SweepOptions) -> Frontier:
    """Runs `kprune sweep`: writes a folder for each fraction, and a table and a figure of them all.

    Raises:
        ValueError, TypeError, OSError: If an option or file is invalid, or the folder is that of another
            sweep; nothing is written then.
    """
    grid = checked_search(None, None, options.reductions)
    for reduction in grid:
        config_removing(reduction, options)
    if options.latency_batch < 1:
        raise ValueError(
            f"latency_batch={options.latency_batch} is no number of sequences. Pass 1 or more."
        )
    before = _results_before(options)
    check_files(options, inputs_of(options), {"latency": options.latency})
    draws = find_spec("matplotlib") is not None
    if not draws:
        print("There will be no figure, as matplotlib is not installed.")
    to_score = rows_to_score(options)
    loaded = load_all(options)
    sweep = _prepared(options, loaded, scoring_for(options, loaded, to_score))
    found = _begun(sweep, before)
    _write(found, sweep, draws)
    for reduction in grid:
        if not _is_finished(found, reduction, options):
            found = found.with_point(_pruned_to(sweep, reduction))
            _write(found, sweep, draws)
    print(found.markdown())
    print(f"Wrote {options.output}. Load a model {how_to_load(options)}.")
    return found


def _results_before(options: SweepOptions) -> dict[str, Any] | None:
    """Returns the results of an earlier sweep into the folder, or None if it is new or empty.

    Raises:
        ValueError, OSError: If the folder holds something else, or cannot be written.
    """
    path = Path(options.output, RESULTS)
    if not path.exists():
        check_output_folder(options.output, "output")
        return None
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        Frontier.from_dict(stored["frontier"])
        dict(stored["about"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not a file of a sweep ({error}). Pass another output."
        ) from error
    return stored


def _prepared(options: SweepOptions, loaded: Loaded, scoring: Scoring) -> Sweep:
    calibration(options, loaded)  # checks the fields
    chosen = config_removing(options.reductions[0], options).to_dict()
    about = {
        "model": config_of(loaded.model),
        "weights": weights_of(loaded.model),
        "options": {name: value for name, value in chosen.items() if name != "reduction"},
        "latency_batch": options.latency_batch,
    }
    about |= calibrated_on(options, loaded) | scoring.about
    return Sweep(
        options,
        loaded,
        scoring,
        table_for_all(options, loaded.model),
        json.loads(json.dumps(about)),
    )


def _begun(sweep: Sweep, before: dict[str, Any] | None) -> Frontier:
    """Returns the earlier results, or those of the model itself.

    Raises:
        ValueError: If the earlier results are of another sweep.
    """
    if before is None:
        score = sweep.scoring.evaluate(sweep.loaded.model)
        return Frontier(
            sweep.options.eval, score, sweep.loaded.model.num_parameters(), _shape(sweep)
        )
    different = [name for name in sweep.about if before["about"].get(name) != sweep.about[name]]
    if different:
        raise ValueError(
            f"output={sweep.options.output!r} is the folder of a sweep with other "
            f"{', '.join(different)}. Pass another folder."
        )
    return Frontier.from_dict(before["frontier"])


def _shape(sweep: Sweep) -> str:
    """What latency is measured on, in words."""
    model, count = sweep.loaded.model, sweep.options.latency_batch
    if model.main_input_name == "pixel_values":
        several = f"{count} image{'s' * (count > 1)}"
    else:
        several = f"{count} sequence{'s' * (count > 1)} of mean length"
    return f"a batch of {several} ({device_name(model.device)})"


def _folder(reduction: float, options: SweepOptions) -> Path:
    return Path(options.output, f"{100 * reduction:.10g}")


def _is_finished(found: Frontier, reduction: float, options: SweepOptions) -> bool:
    point = next((one for one in found.points if one.reduction == reduction), None)
    return point is not None and (bool(point.note) or _folder(reduction, options).is_dir())


def _pruned_to(sweep: Sweep, reduction: float) -> Point:
    """Prunes to one size, unless that was done before an interruption, and measures the result."""
    options, loaded = sweep.options, sweep.loaded
    folder = _folder(reduction, options)
    try:
        if not folder.is_dir():
            _prune(folder, sweep, reduction)
    except UnreachableError as error:
        return Point(reduction, note=str(error).partition(". ")[0])
    # Also a model that was just pruned is measured as others will load it.
    own = replace(options, model=str(folder), revision=None)
    model, report = load_model(own, AutoConfig.from_pretrained(folder)), load_report(folder)
    seconds, dense = model_seconds(
        [model, loaded.model], options.latency_batch, report.sequence_length
    )
    return Point(
        reduction,
        folder.name,
        score=sweep.scoring.evaluate(model),
        cost=report.cost / report.cost_before,
        parameters=model.num_parameters(),
        seconds=seconds,
        dense_seconds=dense,
    )


def _prune(folder: Path, sweep: Sweep, reduction: float) -> None:
    options, loaded = sweep.options, sweep.loaded
    print(f"Pruning to {folder}")
    model = kprune(
        loaded.model,
        calibration(options, loaded),
        config_removing(reduction, options),
        latency=sweep.latency,
    )
    save_all(str(folder), model, loaded.processor, options.self_contained)


def _write(found: Frontier, sweep: Sweep, draws: bool) -> None:
    """Writes what there is: the results, the table, and the figure."""
    folder = Path(sweep.options.output)
    write_json(folder / RESULTS, {"about": sweep.about, "frontier": found.to_dict()})
    with replacing((folder / RESULTS).with_suffix(".md")) as path:
        Path(path).write_text(found.markdown(), encoding="utf-8")
    if draws and found.dense_seconds is not None:
        found.plot((folder / RESULTS).with_suffix(".png"))
