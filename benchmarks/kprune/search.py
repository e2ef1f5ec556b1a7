"""How small can it be: `kprune_to` beside a sweep over all sizes of its grid.

    python -m benchmarks.kprune.search --data DATA --checkpoints FOLDER
    python -m benchmarks.kprune.search --data DATA --checkpoints FOLDER --task mrpc --tolerance 2

A search finds the smallest model whose score on the validation set is at most `--tolerance` points
below the dense model's. The sweep then prunes to every size, on the same calibration data, and shows
which size that is. CPU time counts the pruning and the scoring. Results go to
`benchmarks/results/kprune_search.{json,md,png}` after every sample. Started again, the benchmark resumes
with the samples that are missing. See `accuracy.py` for data and checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kprune_ext import KPruneConfig, kprune, kprune_to
from kprune_ext.budget_search import REDUCTIONS

from ..common.figures import look_of, make_panels, save
from ..common.records import (
    as_code,
    check_settings,
    mean_and_error,
    read_report,
    table,
    with_provenance,
    write_report,
)
from ..common.stopwatch import Stopwatch
from .fine_tuning import common_parser, dense_model, evaluate
from .tasks import TASKS, calibration, read

NAME = "kprune_search"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, default="sst2", help="Task.")
    add("--tolerance", type=float, default=1.0, help="Points that a smaller model may lose.")
    grid = "Shares of FLOPs that may be removed."
    add("--reductions", nargs="+", type=float, default=list(REDUCTIONS), help=grid)
    add("--tokens", type=int, default=12_000, help="Size of the calibration sample, in tokens.")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the sample.")
    return parser.parse_args(given)


def searched_and_swept(
    model: Any, tokenizer: Any, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One sample: what the search finds and what all sizes score, each with its CPU seconds."""
    task = TASKS[args.task]
    rows = read(args.data, args.task, "validation", args.limit)
    train = read(args.data, args.task, "train", args.limit)
    batches = list(calibration(task, tokenizer, train, seed))
    config = KPruneConfig(max_tokens=args.tokens, seed=seed)

    def score(candidate: Any) -> float:
        return evaluate(task, tokenizer, candidate, rows)[task.main]

    clock = Stopwatch()
    found = kprune_to(
        model,
        batches,
        score,
        tolerance=args.tolerance,
        reductions=args.reductions,
        config=config,
        progress=False,
    )
    search, clock = clock.read(), Stopwatch()
    scores = {0.0: score(model)}
    for reduction in sorted(args.reductions):
        own = dataclasses.replace(config, reduction=reduction)
        scores[reduction] = score(kprune(model, batches, own, progress=False))
    return {
        "seed": seed,
        "found": found.reduction,
        "tried": {str(trial.reduction): trial.score for trial in found.trials},
        "best": max(r for r, value in scores.items() if value >= found.limit),
        "scores": {str(reduction): value for reduction, value in scores.items()},
        "limit": found.limit,
        "search_seconds": search,
        "sweep_seconds": clock.read(),
    }


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report as text."""
    rows = [
        [
            str(run["seed"]),
            f"{run['found']:.0%}",
            f"{run['best']:.0%}",
            str(len(run["tried"]) - 1),
            *(f"{run[name]['cpu']:.0f}" for name in ("search_seconds", "sweep_seconds")),
            f"{run['search_seconds']['cpu'] / run['sweep_seconds']['cpu']:.2f}",
        ]
        for run in report["runs"]
    ]
    sizes = [
        [f"{float(size):.0%}", mean_and_error([run["scores"][size] for run in report["runs"]])]
        for size in report["runs"][0]["scores"]
    ]
    header = ["sample", "found", "best", "sizes tried", "search, CPU s", "sweep, CPU s", "share"]
    return "\n".join(
        [
            f"# How small can it be? {report['task']}, at most {report['tolerance']:g} point(s) lost",
            "",
            as_code(dict(report)),
            "",
            table(header, rows),
            table(["FLOPs removed", "score, %"], sizes),
        ]
    )


def plot(report: Mapping[str, Any], path: Path, source: str = "") -> None:
    """Draw the scores of all sizes, and which of them the search has tried."""
    figure, panels = make_panels(len(report["runs"]), 3.6 * len(report["runs"]), 3.2)
    for panel, run in zip(panels, report["runs"], strict=True):
        for name, filled in (("scores", False), ("tried", True)):
            points = sorted((100 * float(size), value) for size, value in run[name].items())
            panel.plot(
                *zip(*points, strict=True),
                color=look_of("ours").colour,
                marker="o",
                linestyle="none" if filled else "-",
                markerfacecolor=None if filled else "white",
            )
        panel.axhline(run["limit"], color="0.35", linestyle=":")
        panel.set_title(f"Sample {run['seed']}")
        panel.set_xlabel("FLOPs removed, % (filled: tried)")
    panels[0].set_ylabel("score, %")
    save(figure, path, source)


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    torch.set_num_threads(args.threads)
    about = {"task": args.task, "tolerance": args.tolerance, "tokens": args.tokens}
    report = read_report(args.results, NAME, about | {"runs": []})
    check_settings(NAME, report, about)
    model, tokenizer = dense_model(args.task, args)
    for seed in args.seeds:
        if seed not in [run["seed"] for run in report["runs"]]:
            report["runs"].append(searched_and_swept(model, tokenizer, seed, args))
            report = with_provenance(report, __spec__.name, given)
            write_report(args.results, NAME, report, as_markdown(report))
            print(
                {name: report["runs"][-1][name] for name in ("seed", "found", "best")}, flush=True
            )
    plot(report, args.results / f"{NAME}.png")


if __name__ == "__main__":
    main()
