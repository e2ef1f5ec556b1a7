"""`kprune_to`: the smallest model whose score is still good enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from .budget.costs import UnreachableError
from .common.fingerprints import config_of, data_of, name_of, weights_of
from .evaluation.bisection import Verdict, search_step, verdict_of
from .files.writing import check_output_files, write_json
from .preparation.config import KPruneConfig
from .preparation.given import given_config
from .pruning import kprune
from .trials import KPruneSearch, Trial, read_trials

#: Fractions to remove that are tried unless others are named.
REDUCTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: By how much a score may miss the limit by chance, as a share of the model's own.
NEAR = 0.005


def kprune_to(
    model: Any,
    dataloader: Any,
    evaluate: Callable[[Any], float],
    *,
    keep: float | None = None,
    tolerance: float | None = None,
    greater_is_better: bool = True,
    reductions: Sequence[float] = REDUCTIONS,
    config: KPruneConfig | None = None,
    state_file: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> KPruneSearch:
    """Prunes as much as a score allows.

    The fractions of `reductions` are searched by bisection, which tries about four of nine. It takes the
    score to fall as more is removed, but a score from a few hundred examples goes up and down. So where
    one misses the limit by less than 0.5 % of the model's own score, the next larger fraction is tried
    before smaller ones. All are pruned on the same calibration data. A fraction that cannot be
    removed, as with `layout="uniform"`, counts as too much.

    Args:
        model: The model, as for `kprune`. It is left as it was.
        dataloader: The calibration data, as for `kprune`.
        evaluate: Function `model -> score`, such as the accuracy on a validation set, which is called
            with the model and with pruned copies of it.
        keep: Fraction of the model's own score that is to be kept; 0.99 if `tolerance` is None, too.
        tolerance: Largest difference from the model's own score, in its unit, instead of `keep`.
        greater_is_better: Whether a greater score is better; False for a loss or perplexity, for which
            `keep=0.99` allows a score of 1/0.99 of the model's.
        reductions: Fractions to remove that may be tried.
        config: Other options of `kprune`; its `reduction` is not used.
        state_file: A JSON file of the scores so far. If it exists and is of the same search, what was
            tried is not tried again. A search is the same if model, options, calibration data (lists and
            data sets, see `about` for others) and the name of `evaluate` are.
        about: Whatever else the search depends on, as values that JSON can hold, by a name for messages:
            such as the validation data of `evaluate`, or calibration data that come from a stream.
        progress: Whether to show a progress bar for each try, in the main process.
        options: Other arguments of `kprune`, such as `tokenizer` and `predict`.

    Returns:
        The search, with the pruned model and the score of everything that was tried.

    Raises:
        TypeError: If `evaluate` is not a function, or does not return a number.
        ValueError: If a limit or fraction is out of range, the score is not finite, the file is of
            another search, or as `kprune`.
    """
    if not callable(evaluate):
        raise TypeError(
            f"evaluate is a {type(evaluate).__name__}, not a function. Pass a function of the model "
            "that returns its score, such as lambda model: accuracy(model, validation_set)."
        )
    if options.get("covariances") is not None:
        raise ValueError(
            "kprune_to prunes several models, and covariances= takes a file of one. Leave it out, and "
            "prune once more at the fraction that was found: kprune(model, data, reduction=…, "
            "covariances=path)."
        )
    grid = checked_search(keep, tolerance, reductions)
    config = given_config(config, None)
    check_output_files({"state_file": None if state_file is None else str(state_file)}, {})
    if isinstance(dataloader, Iterator):
        dataloader = list(dataloader)
    same: dict[str, Any] = {}
    trials: dict[float, Trial] = {}
    if state_file is not None:
        same = _identity(model, config, dataloader, evaluate, greater_is_better) | dict(about or {})
        trials = read_trials(Path(state_file), same)
    found: dict[float, Any] = {}

    def pruned_by(reduction: float) -> Any:
        own = replace(config, reduction=reduction)
        return kprune(model, dataloader, own, progress=progress, **options)

    def tried(reduction: float) -> Trial:
        if reduction in trials:
            return trials[reduction]
        start = time.perf_counter()
        score, cost, note = None, None, ""
        try:
            result = found[reduction] = pruned_by(reduction) if reduction else model
            score, cost = _score(evaluate, result), _share(result)
        except UnreachableError as error:
            note = str(error).partition(". ")[0]
        trials[reduction] = Trial(reduction, score, cost, time.perf_counter() - start, note)
        if state_file is not None:
            write_json(state_file, {"about": same, "trials": [asdict(t) for t in trials.values()]})
        return trials[reduction]

    own_score = tried(0.0).score or 0.0
    limit = _limit(own_score, keep, tolerance, greater_is_better)
    verdicts: list[Verdict | None] = [None] * len(grid)
    best, place = search_step(verdicts)
    while place is not None:
        score = tried(grid[place]).score
        verdicts[place] = verdict_of(score, limit, NEAR * abs(own_score), greater_is_better)
        best, place = search_step(verdicts)
        for other in [other for other in found if best is None or other != grid[best]]:
            del found[other]  # it is not the result
    chosen = 0.0 if best is None else grid[best]
    pruned = found.get(chosen) if chosen else None
    if chosen and pruned is None:  # it was tried before an interruption
        pruned = pruned_by(chosen)
    every = tuple(trials[reduction] for reduction in sorted(trials))
    return KPruneSearch(pruned, chosen, limit, greater_is_better, every)


def checked_search(
    keep: float | None, tolerance: float | None, reductions: Sequence[float]
) -> list[float]:
    """Returns the fractions to try in ascending order, after checking the limits.

    Raises:
        ValueError: If one of the arguments, which are those of `kprune_to`, is out of range.
    """
    if keep is not None and tolerance is not None:
        raise ValueError("Both keep= and tolerance= were passed. Pass one of them.")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"keep={keep!r} is not a fraction of the score, above 0 and at most 1.")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance!r} is not a difference of scores of at least 0.")
    grid = sorted({float(reduction) for reduction in reductions})
    if not grid or not 0 < grid[0] <= grid[-1] < 1:
        raise ValueError(
            f"reductions={list(reductions)!r}: pass the fractions to try, each between 0 and 1."
        )
    return grid


def _limit(score: float, keep: float | None, tolerance: float | None, greater: bool) -> float:
    if tolerance is not None:
        return score - tolerance if greater else score + tolerance
    share = 0.99 if keep is None else keep
    if score <= 0:
        raise ValueError(
            f"The model's own score is {score:.4g}, of which no fraction can be kept. Pass tolerance= "
            "instead of keep=."
        )
    return score * share if greater else score / share


def _score(evaluate: Callable[[Any], float], model: Any) -> float:
    score = evaluate(model)
    try:
        number = float(score)
    except (TypeError, ValueError):
        raise TypeError(
            f"evaluate returned a {type(score).__name__}, not a number. Return one score, such as "
            "metrics['accuracy']."
        ) from None
    if not math.isfinite(number):
        raise ValueError(f"evaluate returned {number}, which cannot be compared.")
    return number


def _share(model: nn.Module) -> float:
    """The fraction of the pruned quantity that a model has left."""
    for module in model.modules():
        report = getattr(module, "kprune_report", None)
        if report is not None:
            return float(report.cost / report.cost_before)
    return 1.0


def _identity(
    model: nn.Module,
    config: KPruneConfig,
    data: Any,
    evaluate: Callable[[Any], float],
    greater: bool,
) -> dict[str, Any]:
    options = {name: value for name, value in config.to_dict().items() if name != "reduction"}
    inner: Any = next((m for m in model.modules() if hasattr(m, "config")), model)
    return {
        "model": config_of(inner),
        "weights": weights_of(model),
        "options": options,
        "calibration data": data_of(data),
        "evaluate": name_of(evaluate),
        "greater_is_better": greater,
    }
