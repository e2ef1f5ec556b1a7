"""Table and picture of the study of embedders."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..common.figures import draw_points, label_ends, look_of, make_panels, save
from ..common.records import as_code, mean_and_error, table
from .accuracy import SHAPES, label

Run = dict[str, Any]
#: Names of the scores that readers know, by their name in a report.
NAMES = {"stsb": "STS-B", "mrpc": "MRPC", "qnli": "QNLI"}
#: Where a run has its scores: as pruned, and after distillation.
STAGES = {"scores": "", "distilled_scores": "_distilled"}


def by_cell(runs: Sequence[Run]) -> dict[tuple[Any, ...], list[Run]]:
    """Runs that differ in the seed alone."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        key = (run["model"], pairs_of(run), run["tokens"], run["reduction"], label(run))
        found.setdefault((*key, run["minutes"], run["rate"]), []).append(run)
    return found


def at_stage(runs: Sequence[Run], stage: str) -> list[Run]:
    """Runs that have scores of this stage, those as pruned once for each pruning."""
    again = stage == "scores"
    return [run for run in runs if stage in run and not (again and run.get("pruned_before"))]


def pairs_of(run: Run) -> str:
    """Numbers of pairs that a run was scored on, in words."""
    return " / ".join(f"{most:,}" if most else "all" for most in run["pairs"].values())


def as_markdown(report: dict[str, Any]) -> str:
    """A row for each model, reduction and method, and another one where it was distilled."""
    text = (
        "Spearman's correlation of cosines, in percent: means over samples ± one standard error of the "
        "mean. `of dense`: STS-B's as a part of the dense model's. `cosine`: mean to the dense model's "
        "embeddings of STS-B's texts. CPU seconds and MiB (the peak beyond the loaded model) are those "
        "of pruning. Speed-ups are those of the dense model's median time on one thread, for batches × "
        f"tokens. `pairs`: of STS-B, MRPC and QNLI. {as_code(report)}\n\n"
    )
    dense = {
        (run["model"], pairs_of(run)): run["scores"]
        for run in report["runs"]
        if run["method"] == "dense"
    }
    rows = []
    cells = by_cell(report["runs"])
    for cell in sorted(cells):
        runs = cells[cell]
        for stage, ending in STAGES.items():
            if own := at_stage(runs, stage):
                rows.append(_row(cell, own, stage, ending, dense.get(cell[:2])))
    head = "model, pairs, tokens, removed, method, minutes, rate"
    rest = "of dense, cosine, samples, FLOPs kept, CPU s, extra MiB"
    shapes = [f"speed-up {batch} × {tokens}" for batch, tokens in SHAPES]
    return text + table([*head.split(", "), *NAMES.values(), *rest.split(", "), *shapes], rows)


def _row(
    cell: tuple[Any, ...], runs: Sequence[Run], stage: str, ending: str, dense: Run | None
) -> list[str]:
    model, pairs, tokens, reduction, method, _, rate = cell

    def mean(value: Callable[[Run], float | None], form: str) -> str:
        found = [one for run in runs if (one := value(run)) is not None]
        return format(statistics.mean(found), form) if found else "–"

    minutes = mean(lambda run: run.get("distillation", {}).get("minutes"), ".1f")
    ratio = None if dense is None else dense["stsb"]
    return [
        model,
        pairs,
        f"{tokens:,}" if tokens else "–",
        f"{reduction:.0%}",
        method + (", distilled" if ending else ""),
        *((minutes, f"{rate:g}") if ending else ("–", "–")),
        *(mean_and_error([run[stage][name] for run in runs], ".1f") for name in NAMES),
        mean(lambda run: run[stage]["stsb"] / ratio if ratio else None, ".1%"),
        mean(lambda run: run[stage].get("cosine"), ".3f"),
        str(len(runs)),
        mean(lambda run: run.get("flops_kept"), ".1%"),
        mean(lambda run: run.get("cpu_seconds"), ".0f"),
        mean(lambda run: run.get("extra_mib"), ".0f"),
        *(
            f"{mean(lambda run, key=f'latency_{batch}': run.get(key, {}).get('speedup'), '.2f')}×"
            if any(f"latency_{batch}" in run for run in runs)
            else "–"
            for batch, _ in SHAPES
        ),
    ]


def plot(report: dict[str, Any], path: Path, source: str = "") -> None:
    """Draw STS-B's correlation against the FLOPs removed, a panel for each model."""
    models = list(dict.fromkeys(run["model"] for run in report["runs"]))
    figure, panels = make_panels(len(models), 4.8 * len(models), 4)
    for panel, model in zip(panels, models, strict=True):
        own = [run for run in report["runs"] if run["model"] == model and not run.get("options")]
        draw_model(panel, own)
        panel.set(title=model)
    save(figure, path, source)


def draw_model(panel: Any, runs: Sequence[Run]) -> None:
    """Draw all methods of one model, as pruned and as distilled, with the sizes most runs have."""
    shapes = [(pairs_of(run), run["tokens"]) for run in runs if run["tokens"]]
    usual = max(dict.fromkeys(shapes), key=shapes.count) if shapes else ("", 0)
    ends = []
    for method in dict.fromkeys(run["method"] for run in runs):
        for stage, ending in STAGES.items():
            points: dict[float, list[float]] = {}
            for run in at_stage(runs, stage):
                fits = run["tokens"] in (0, usual[1]) and usual[0] in ("", pairs_of(run))
                if run["method"] == method and fits:
                    points.setdefault(100 * run["reduction"], []).append(run[stage]["stsb"])
            ends.append(draw_points(panel, sorted(points.items()), look_of(method + ending)))
    panel.set(xlabel="FLOPs of the encoder removed, %", ylabel="Spearman correlation on STS-B, %")
    label_ends(panel, ends)
