"""Accuracy of pruned MiniLM-L6 against FLOPs, for K-prune, the paper's way of it and two baselines.

    python -m benchmarks.kprune.accuracy --data DATA --checkpoints FOLDER
    python -m benchmarks.kprune.accuracy --data DATA --checkpoints FOLDER --tasks sst2 --seeds 0 \\
        --reductions 0.8 --tokens 12000 --methods ours

The model is fine-tuned once per task and kept in `--checkpoints`. Then every run prunes it in a process
of its own, so that CPU time and peak memory are those of the run alone. Results go to
`benchmarks/results/kprune_accuracy.{json,md}` after every run, and a picture is drawn at the end (unless
there is another `--name`). Started again, the study resumes with the runs that are missing.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kprune_ext import KPruneConfig, kprune
from kprune_ext.budget.latency import median_seconds

from ..common.command_line import add_child
from ..common.figures import (
    METRIC_NAMES,
    data_name,
    draw_points,
    label_ends,
    look_of,
    make_panels,
    save,
)
from ..common.memory import peak_bytes
from ..common.records import (
    as_code,
    in_child,
    mean_and_error,
    read_report,
    table,
    with_provenance,
    write_report,
)
from .baselines import prune_by
from .fine_tuning import common_parser, dense_model, evaluate
from .tasks import TASKS, calibration, read

NAME = "kprune_accuracy"
METHODS = ("ours", "paper", "fisher_mask", "magnitude")
KEY = ("task", "method", "reduction", "tokens", "seed", "split")
SHAPES = ((32, 64), (1, 64))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=["sst2", "mrpc"], help="Tasks.")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="Methods to prune with.")
    reductions = [0.4, 0.5, 0.6, 0.7, 0.8]
    add(
        "--reductions", nargs="+", type=float, default=reductions, help="Shares of FLOPs to remove."
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the calibration sample.")
    tokens = "Greatest sizes of the calibration sample, in tokens."
    add("--tokens", nargs="+", type=int, default=[100_000], help=tokens)
    splits = ["validation", "test"]
    add("--split", choices=splits, default="validation", help="Split to measure on.")
    options = "JSON with options of KPruneConfig for the method `ours`."
    add("--options", type=json.loads, default={}, help=options)
    add("--name", default=NAME, help="Name of the result files.")
    add("--rounds", type=int, default=9, help="Number of rounds of timing; 0 leaves it out.")
    in_process = "Run everything in one process; figures of memory are meaningless then."
    add("--in-process", action="store_true", help=in_process)
    add_child(parser, type=json.loads)
    return parser.parse_args(given)


def run_one(run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Prune once, and measure metrics, FLOPs kept, CPU seconds, peak memory and latencies."""
    torch.set_num_threads(args.threads)
    name, method = run["task"], run["method"]
    model, tokenizer = dense_model(name, args)
    rows = read(args.data, name, run["split"], args.limit)
    if method == "dense":
        return run | evaluate(TASKS[name], tokenizer, model, rows) | {"flops_kept": 1.0}
    train = read(args.data, name, "train", args.limit)
    batches = list(calibration(TASKS[name], tokenizer, train, run["seed"]))
    common = {"reduction": run["reduction"], "max_tokens": run["tokens"], "seed": run["seed"]}
    gc.collect()
    before, start, wall = peak_bytes(), time.process_time(), time.perf_counter()
    if method in ("magnitude", "fisher_mask"):
        pruned, kept = prune_by(method, model, batches, KPruneConfig(**common))
    else:
        own = (
            KPruneConfig.paper(**common)
            if method == "paper"
            else KPruneConfig(**(common | run.get("options", {})))
        )
        pruned = kprune(model, batches, own, progress=False)
        kept = pruned.kprune_report.flops / pruned.kprune_report.flops_before
        run = run | {"errors": [row.error for row in pruned.kprune_report.sublayers]}
    cpu, wall = time.process_time() - start, time.perf_counter() - wall
    measured = {
        "flops_kept": kept,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "extra_mib": (peak_bytes() - before) / 2**20,
        "peak_mib": peak_bytes() / 2**20,
        "layers": pruned.config.kprune["layers"],
    }
    return (
        run
        | evaluate(TASKS[name], tokenizer, pruned, rows)
        | measured
        | speed(model, pruned, args.rounds)
    )


@torch.no_grad()
def speed(dense: Any, pruned: Any, rounds: int) -> dict[str, Any]:
    """The seconds per batch of both models, which take turns, by the shape of the batch."""
    found: dict[str, Any] = {}
    for batch, tokens in SHAPES if rounds else ():
        tokens = min(tokens, dense.config.max_position_embeddings)
        ids = torch.randint(5, dense.config.vocab_size, (batch, tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        runs = [partial(model, **inputs) for model in (dense, pruned)]
        before, after = median_seconds(runs, rounds, lambda: None)
        found[f"latency_{batch}"] = {"dense": before, "pruned": after, "speedup": before / after}
    return found


def wanted_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the options ask for, and the dense model of each task."""
    runs = []
    for task in args.tasks:
        base = {"task": task, "split": args.split}
        runs.append(base | {"method": "dense", "reduction": 0.0, "tokens": 0, "seed": 0})
        runs += [
            base
            | {"method": method, "reduction": reduction, "tokens": tokens, "seed": seed}
            | ({"options": args.options} if args.options and method == "ours" else {})
            for seed in args.seeds
            for tokens in args.tokens
            for reduction in args.reductions
            for method in args.methods
        ]
    return runs


def key_of(run: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a run from all others."""
    return (*(run[name] for name in KEY), label(run))


def label(run: dict[str, Any]) -> str:
    """The method, and the options that differ from its defaults."""
    signal = {"signal": run["signal"]} if "signal" in run else {}
    options = sorted((run.get("options", {}) | signal).items())
    return " ".join([run["method"], *(f"{name}={value}" for name, value in options)])


def as_markdown(report: dict[str, Any]) -> str:
    """A row per task, method, sample size and reduction, with means over seeds and their errors."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        key = tuple(run[name] for name in ("task", "split", "reduction", "tokens"))
        groups.setdefault((*key, label(run)), []).append(run)
    rows = []
    for (task, split, reduction, tokens, method), runs in sorted(groups.items()):
        values = [run[TASKS[task].main] for run in runs]

        def mean(name: str, form: str, runs: list[dict[str, Any]] = runs) -> str:
            found = [run[name] for run in runs if name in run]
            return format(statistics.mean(found), form) if found else "–"

        speeds = []
        for batch, _ in SHAPES:  # not every run was timed
            timed = [run[key]["speedup"] for run in runs if (key := f"latency_{batch}") in run]
            speeds.append(f"{statistics.mean(timed):.2f}×" if timed else "–")
        rows.append(
            [
                task,
                split,
                f"{reduction:.0%}",
                f"{tokens:,}",
                method,
                f"{TASKS[task].main} {mean_and_error(values, '.1f')}",
                str(len(runs)),
                mean("flops_kept", ".2%"),
                mean("cpu_seconds", ".0f"),
                mean("extra_mib", ".0f"),
                *speeds,
            ]
        )
    head = "task, split, reduction, tokens, method, result, seeds, FLOPs kept, CPU s, extra MiB"
    shapes = [f"speed-up {batch} × {tokens}" for batch, tokens in SHAPES]
    return (
        f"Means over sample seeds ± one standard error of the mean. {as_code(report)}\n\n"
        + table([*head.split(", "), *shapes], rows)
    )


def plot(report: dict[str, Any], path: Path, source: str = "") -> None:
    """Draw the main metric against the FLOPs removed: a panel per task, with the usual sample size."""
    tasks = list(dict.fromkeys(run["task"] for run in report["runs"]))
    figure, panels = make_panels(len(tasks), 4.4 * len(tasks), 3.8)
    for panel, task in zip(panels, tasks, strict=True):
        tokens = draw_task(panel, report, task)
        panel.set(title=f"{data_name(task)}, {tokens:,} tokens")
    save(figure, path, source)


def draw_task(panel: Any, report: dict[str, Any], task: str) -> int:
    """Draw one task, and return the sample size that most of its runs have, which is drawn."""
    own = [run for run in report["runs"] if run["task"] == task and not run.get("options")]
    cells = {(run["tokens"], run["method"], run["reduction"]) for run in own if run["tokens"]}
    counts = collections.Counter(tokens for tokens, *_ in cells)
    tokens = max(counts, key=lambda size: (counts[size], size), default=0)
    ends = []
    for method in ("dense", *METHODS):
        points: dict[float, list[float]] = {}
        for run in own:
            if run["method"] == method and run["tokens"] in (0, tokens):
                points.setdefault(100 * run["reduction"], []).append(run[TASKS[task].main])
        ends.append(draw_points(panel, sorted(points.items()), look_of(method)))
    panel.set(xlabel="FLOPs of the encoder removed, %", ylabel=METRIC_NAMES[TASKS[task].main])
    label_ends(panel, ends)
    return tokens


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    if args.one is not None:
        print(json.dumps(run_one(args.one, args)))
        return
    report = read_report(args.results, args.name, {"runs": []})
    done = {key_of(run) for run in report["runs"]}
    for task in args.tasks:
        dense_model(task, args)
    for run in wanted_runs(args):
        if key_of(run) in done:
            continue
        if args.in_process:
            result = run_one(run, args)
        else:
            result = in_child(__spec__.name, given, json.dumps(run))
        done.add(key_of(run))
        report = with_provenance(report, __spec__.name, given) | {"runs": [*report["runs"], result]}
        write_report(args.results, args.name, report, as_markdown(report))
        print({name: result.get(name) for name in (*KEY, TASKS[run["task"]].main)}, flush=True)
    if args.name == NAME:
        plot(report, args.results / f"{NAME}.png")


if __name__ == "__main__":
    main()
