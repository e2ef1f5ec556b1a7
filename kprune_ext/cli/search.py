"""The subcommand `kprune search`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..budget.latency import LatencyTable
from ..budget_search import checked_search, kprune_to
from ..command_inputs.inputs import Loaded, load_all
from ..command_inputs.scoring import rows_to_score, scoring_for
from ..common.fingerprints import data_of
from ..files.writing import check_output_folder, resolved
from ..trials import KPruneSearch
from .prune import (
    check_files,
    config_removing,
    how_to_load,
    latency_table,
    measured_table,
    save_all,
)

if TYPE_CHECKING:
    from ..command_inputs.search_options import ScoredOptions, SearchOptions


@dataclass(frozen=True)
class Repeated:
    """Batches that can be read several times.

    Attributes:
        make: Returns an iterator over the batches.
    """

    make: Callable[[], Iterator[dict[str, Any]]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.make()


def run_search(options: SearchOptions) -> KPruneSearch:
    """Runs `kprune search`: prints what was tried, and writes the smallest model that is good enough.

    Raises:
        ValueError, TypeError, OSError: If an option or file is invalid, or no model is good enough; no
            model is written then.
    """
    checked_search(options.keep, options.tolerance, options.reductions)
    config = config_removing(min(options.reductions), options)
    check_output_folder(options.output, "output")
    check_files(
        options, inputs_of(options), {"state_file": options.state_file, "latency": options.latency}
    )
    out = resolved(options.output, "output")
    to_score = rows_to_score(options)
    loaded = load_all(options)
    scoring = scoring_for(options, loaded, to_score)
    found = kprune_to(
        loaded.model,
        calibration(options, loaded),
        scoring.evaluate,
        keep=options.keep,
        tolerance=options.tolerance,
        greater_is_better=scoring.greater_is_better,
        reductions=options.reductions,
        config=config,
        state_file=options.state_file,
        about=calibrated_on(options, loaded) | scoring.about,
        latency=table_for_all(options, loaded.model),
    )
    print(found)
    if found.model is None:
        raise ValueError(
            f"No model was written: with {min(options.reductions):.0%} removed, the smallest of "
            f"reductions, the score misses the limit of {found.limit:.4g}. Pass smaller reductions, a "
            "smaller keep or a larger tolerance, or more max_tokens."
        )
    save_all(out, found.model, loaded.processor, options.self_contained)
    print(
        f"Wrote {options.output}, with {found.reduction:.0%} removed. Load it {how_to_load(options)}."
    )
    return found


def inputs_of(options: ScoredOptions) -> dict[str, str | None]:
    """Returns the inputs of a command that scores models, by the names of their options."""
    return {"model": options.model, "data": options.data, "eval_data": options.eval_data}


def calibration(options: ScoredOptions, loaded: Loaded) -> Repeated:
    """Returns the calibration data, which every model is pruned with.

    Raises:
        ValueError: If they lack the fields that the options name.
    """
    loaded.batches(loaded.rows, options)
    return Repeated(lambda: loaded.batches(loaded.rows, options))


def calibrated_on(options: ScoredOptions, loaded: Loaded) -> dict[str, Any]:
    """Returns what identifies the calibration data, as plain values."""
    names = ("text_field", "image_field", "max_length")
    return {
        "calibration data": data_of(loaded.rows),
        "form of the calibration data": {name: getattr(options, name) for name in names},
    }


def table_for_all(options: ScoredOptions, model: Any) -> LatencyTable | None:
    """Returns the latency table for all fractions, so that they are cut by the same costs."""
    if options.metric != "latency":
        return None
    return latency_table(options, model) or measured_table(options, model)
