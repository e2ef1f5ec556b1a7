"""What one factor on all logits does to a pruned classifier's probabilities.

    python -m benchmarks.kprune.logits --data DATA --checkpoints FOLDER

The models of `accuracy.py` are pruned. Their predictions on the test sets are compared with the dense
model's, with the factor that `KPruneConfig(scale_logits=True)` has chosen on the calibration data, and
without it. Results go to `benchmarks/results/kprune_logits.{json,md}` after every run. Started again,
the study resumes with the runs that are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from kprune_ext import KPruneConfig, kprune
from kprune_ext.tuning.divergence import divergence

from ..common.records import (
    as_code,
    mean_and_error,
    read_report,
    table,
    with_provenance,
    write_report,
)
from .fine_tuning import common_parser, dense_model
from .tasks import TASKS, Row, Task, calibration, encode, letters, read

NAME = "kprune_logits"
KEY = ("task", "reduction", "tokens", "seed")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("--task", choices=["sst2", "mrpc"], default="sst2", help="Task.")
    add("--reduction", type=float, default=0.8, help="Share of FLOPs to remove.")
    tokens = "Greatest sizes of the calibration sample, in tokens."
    add("--tokens", nargs="+", type=int, default=[2000, 12_000, 100_000], help=tokens)
    seeds = [59, 60, 61]
    add("--seeds", nargs="+", type=int, default=seeds, help="Seeds of the calibration sample.")
    return parser.parse_args(given)


@torch.no_grad()
def logits_of(task: Task, tokenizer: Any, model: Any, rows: list[Row]) -> Tensor:
    """The logits `(rows, classes)` of rows in their order, computed in batches of like length."""
    order = sorted(range(len(rows)), key=lambda row: letters(task, rows[row]))
    found = torch.empty(len(rows), task.labels)
    for start in range(0, len(rows), 32):
        part = order[start : start + 32]
        encoded = encode(task, tokenizer, [rows[row] for row in part])
        found[part] = model(**encoded).logits
    return found


def compared(logits: Tensor, dense: Tensor, rows: list[Row], task: Task) -> dict[str, float]:
    """Divergence from the dense model in nats; agreement with it and the task's metrics in percent."""
    apart = divergence(logits, dense, "single_label_classification")
    agreement = (logits.argmax(1) == dense.argmax(1)).float().mean()
    right = torch.tensor([row["label"] for row in rows])
    loss = torch.nn.functional.cross_entropy(logits, right)
    return {
        "divergence": float(apart.mean()),
        "agreement": 100 * float(agreement),
        "loss": float(loss),
    } | task.metrics(list(logits), rows)


def run_one(run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Prune once, and compare the predictions with and without the factor."""
    task = TASKS[run["task"]]
    dense, tokenizer = dense_model(run["task"], args)
    train = read(args.data, run["task"], "train", args.limit)
    rows = read(args.data, run["task"], "test", args.limit)
    batches = list(calibration(task, tokenizer, train, run["seed"]))
    options = {"reduction": run["reduction"], "max_tokens": run["tokens"], "seed": run["seed"]}
    pruned = kprune(dense, batches, KPruneConfig(**options), progress=False)
    scale = pruned.kprune_report.logit_scale
    wanted = logits_of(task, tokenizer, dense, rows)
    found = logits_of(task, tokenizer, pruned, rows)
    return run | {
        "scale": scale,
        "with": compared(found, wanted, rows, task),
        "without": compared(found / scale, wanted, rows, task),
        "dense": compared(wanted, wanted, rows, task),
    }


def as_markdown(report: dict[str, Any]) -> str:
    """A row per task, reduction and sample size, with means over seeds and their errors."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        groups.setdefault(tuple(run[name] for name in KEY[:3]), []).append(run)
    rows = []
    for (task, reduction, tokens), runs in sorted(groups.items()):
        main = TASKS[task].main

        def mean(way: str, name: str, form: str, runs: list[dict[str, Any]] = runs) -> str:
            return mean_and_error([run[way][name] for run in runs], form)

        ratios = [run["with"]["divergence"] / run["without"]["divergence"] for run in runs]
        rows.append(
            [
                f"{task}, {reduction:.0%}",
                f"{tokens:,}",
                str(len(runs)),
                f"{statistics.mean(run['scale'] for run in runs):.2f}",
                mean("without", "divergence", ".3f"),
                mean("with", "divergence", ".3f"),
                f"{statistics.mean(ratios):.2f}",
                mean("without", "loss", ".3f"),
                mean("with", "loss", ".3f"),
                f"{runs[0]['dense']['loss']:.3f}",
                f"{main} {mean('with', main, '.1f')}",
                f"{runs[0]['dense'][main]:.1f}",
            ]
        )
    head = (
        "data, pruned; tokens; seeds; factor; divergence without; divergence with; ratio; loss without; "
        "loss with; loss, dense; metric, the same with and without; metric, dense"
    )
    return (
        "Test sets; divergence of predictions from the dense model's and loss against the labels in "
        f"nats; means over sample seeds ± one standard error. {as_code(report)}\n\n"
        + table(head.split("; "), rows)
    )


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    torch.set_num_threads(args.threads)
    report = read_report(args.results, NAME, {"runs": []})
    done = {tuple(run[name] for name in KEY) for run in report["runs"]}
    for seed in args.seeds:
        for tokens in args.tokens:
            run = dict(zip(KEY, (args.task, args.reduction, tokens, seed), strict=True))
            if tuple(run.values()) in done:
                continue
            report["runs"].append(run_one(run, args))
            report = with_provenance(report, __spec__.name, given) | {"runs": report["runs"]}
            write_report(args.results, NAME, report, as_markdown(report))
            print(json.dumps(report["runs"][-1]), flush=True)


if __name__ == "__main__":
    main()
