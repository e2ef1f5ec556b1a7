"""What an adapter wins back after pruning: K-prune, then nothing, LoRA or CorDA for one epoch.

    python -m benchmarks.kprune.recovery --data DATA --checkpoints FOLDER

The fine-tuned MiniLM-L6 of `accuracy.py` is pruned (and made first, if it is not in `--checkpoints`).
Then an adapter is trained on every linear layer that is left. The rate of each method and reduction is
the one that is best on the validation set; the test set is reported. Results go to
`benchmarks/results/kprune_recovery.{json,md,png}` after every run. Started again, the study resumes with
the runs that are missing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed

from kprune_ext import KPruneConfig, kprune
from peft_corda import CordaConfig, calibrate

from ..common.figures import (
    METRIC_NAMES,
    End,
    draw_points,
    label_ends,
    look_of,
    make_panels,
    save,
)
from ..common.models import encoder_linear_layers
from ..common.records import (
    as_code,
    check_settings,
    mean_and_error,
    model_label,
    read_report,
    table,
    with_provenance,
    write_report,
)
from .accuracy import speed
from .fine_tuning import common_parser, dense_model, evaluate, train
from .tasks import TASKS, calibration, read

NAME = "kprune_recovery"
RATES = {"none": [0.0], "lora": [3e-4, 1e-3, 3e-3], "corda": [1e-4, 3e-4, 1e-3]}
KEY = ("task", "reduction", "after", "rate", "seed")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("--task", choices=["sst2", "mrpc", "stsb"], default="sst2", help="Task.")
    reductions = [0.4, 0.6, 0.8]
    add(
        "--reductions", nargs="+", type=float, default=reductions, help="Shares of FLOPs to remove."
    )
    add("--after", nargs="+", choices=RATES, default=list(RATES), help="What follows pruning.")
    add("--rates", nargs="+", type=float, help="Learning rates; by default each method's own.")
    seeds = "Seeds of the calibration sample, and of training."
    add("--seeds", nargs="+", type=int, default=[0], help=seeds)
    tokens = "Greatest size of the calibration sample, in tokens."
    add("--tokens", type=int, default=12_000, help=tokens)
    add("--rank", type=int, default=8, help="Rank of the adapters.")
    add("--adapter-epochs", type=int, default=1, help="Epochs of training an adapter.")
    add("--rounds", type=int, default=9, help="Number of rounds of timing; 0 leaves it out.")
    return parser.parse_args(given)


def pruned_model(reduction: float, seed: int, args: argparse.Namespace) -> PreTrainedModel:
    """The pruned model, which is kept beside the dense one for the next run."""
    folder = args.checkpoints / f"{args.task}-{reduction:g}-{args.tokens}-{seed}"
    if not (folder / "config.json").exists():
        model, tokenizer = dense_model(args.task, args)
        rows = read(args.data, args.task, "train", args.limit)
        batches = calibration(TASKS[args.task], tokenizer, rows, seed)
        config = KPruneConfig(reduction=reduction, max_tokens=args.tokens, seed=seed)
        kprune(model, batches, config, progress=False).save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def adapt(model: PreTrainedModel, run: dict[str, Any], batches: Any, args: Any) -> torch.nn.Module:
    """The model with a LoRA or CorDA (ipm) adapter on its linear layers; its head is trained, too."""
    common = {
        "r": args.rank,
        "lora_alpha": args.rank,
        "target_modules": encoder_linear_layers(model),
        "task_type": "SEQ_CLS",
    }
    if run["after"] == "lora":
        return get_peft_model(model, LoraConfig(**common))
    config = CordaConfig(corda_method="ipm", **common)
    calibrate(model, config, batches)
    return get_peft_model(model, config)


def run_one(run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Train or not, and measure on the validation and test sets, in percent."""
    task = TASKS[args.task]
    dense, tokenizer = dense_model(args.task, args)
    rows = read(args.data, args.task, "train", args.limit)
    model: Any = dense
    found: dict[str, Any] = {}
    if run["reduction"]:
        model = pruned_model(run["reduction"], run["seed"], args)
        found["parameters"] = model.num_parameters()
        found |= speed(dense, model, args.rounds)
    if run["after"] != "none":
        set_seed(run["seed"])
        sample = list(calibration(task, tokenizer, rows[:512], run["seed"]))
        model = adapt(model, run, sample, args)
        found["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        train(
            task,
            tokenizer,
            model,
            rows,
            rate=run["rate"],
            epochs=args.adapter_epochs,
            seed=run["seed"],
        )
    for split in ("validation", "test"):
        measured = evaluate(task, tokenizer, model, read(args.data, args.task, split, args.limit))
        found[split] = measured[task.main]
    return run | found


def wanted_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the options ask for, and the dense model."""
    make = partial(dict, task=args.task)
    runs = [make(reduction=0.0, after="none", rate=0.0, seed=0)]
    for seed in args.seeds:
        for reduction in args.reductions:
            for after in args.after:
                rates = args.rates if args.rates and after != "none" else RATES[after]
                runs += [make(reduction=reduction, after=after, rate=r, seed=seed) for r in rates]
    return runs


def best_rates(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each reduction and method, the runs (one per seed) with the rate that validation prefers.

    Rates that were not run with all seeds of the method are compared by the seeds that they have.
    """
    groups: dict[tuple[float, str], dict[float, list[dict[str, Any]]]] = {}
    for run in runs:
        own = groups.setdefault((run["reduction"], run["after"]), {})
        own.setdefault(run["rate"], []).append(run)
    return [
        max(rates.values(), key=lambda own: statistics.mean(run["validation"] for run in own))
        for _, rates in sorted(
            groups.items(), key=lambda item: (item[0][0], list(RATES).index(item[0][1]))
        )
    ]


def as_markdown(report: dict[str, Any]) -> str:
    """A row per reduction and method."""
    rows = []
    for runs in best_rates(report["runs"]):
        first, tests = runs[0], [run["test"] for run in runs]
        timed = [run["latency_32"]["speedup"] for run in runs if "latency_32" in run]
        rows.append(
            [
                f"{first['reduction']:.0%}",
                first["after"],
                f"{first['rate']:g}" if first["rate"] else "–",
                f"{statistics.mean(run['validation'] for run in runs):.1f}",
                mean_and_error(tests, ".1f"),
                str(len(runs)),
                f"{statistics.mean(timed):.2f}×" if timed else "–",
                f"{first['parameters'] / 1e6:.1f} M" if "parameters" in first else "–",
                f"{first['trained']:,}" if "trained" in first else "–",
            ]
        )
    head = "pruned, then, rate, validation, test, seeds, speed-up 32 × 64, parameters, trained"
    settings = report["settings"]
    return (
        f"{settings['model']}, {settings['task']}, {TASKS[settings['task']].main} in percent; "
        f"pruned with {settings['tokens']:,} tokens, then rank {settings['rank']}, "
        f"{settings['adapter_epochs']} epoch(s); "
        "rates by validation; means over seeds ± one standard error. "
        f"{as_code(report)}\n\n" + table(head.split(", "), rows)
    )


def plot(report: dict[str, Any], path: Path, source: str = "") -> None:
    """Draw the test results against the share that was pruned, and against the speed-up."""
    figure, panels = make_panels(2, 10, 4)
    chosen = best_rates(report["runs"])
    timed = [run for run in report["runs"] if "latency_32" in run]
    ends: tuple[list[End | None], list[End | None]] = ([], [])
    for after in RATES:
        own = [runs for runs in chosen if runs[0]["after"] == after and runs[0]["reduction"]]
        values = [(runs[0]["reduction"], [run["test"] for run in runs]) for runs in own]
        speeds = {
            reduction: [r["latency_32"]["speedup"] for r in timed if r["reduction"] == reduction]
            for reduction, _ in values
        }
        look = look_of(after)
        ends[0].append(draw_points(panels[0], [(100 * at, found) for at, found in values], look))
        quick = [(statistics.median(speeds[at]), found) for at, found in values if speeds[at]]
        ends[1].append(draw_points(panels[1], quick, look))
    dense = statistics.mean(run["test"] for runs in chosen for run in runs if not run["reduction"])
    metric = METRIC_NAMES[TASKS[report["settings"]["task"]].main]
    labels = ("FLOPs of the encoder removed, %", "times as fast, batches of 32 × 64 tokens")
    for panel, label, found in zip(panels, labels, ends, strict=True):
        panel.axhline(dense, color="grey", linewidth=0.8)
        panel.annotate(
            "dense model", (0.02, dense), xycoords=("axes fraction", "data"), va="bottom"
        )
        panel.set(xlabel=label, ylabel=f"{metric}, test set")
        label_ends(panel, found)
    save(figure, path, source)


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    torch.set_num_threads(args.threads)
    label = "MiniLM-L6" if args.model is None else model_label(args.model)
    settings = {"model": label} | {
        n: getattr(args, n) for n in ("task", "tokens", "rank", "adapter_epochs")
    }
    report = read_report(args.results, NAME, {"runs": [], "settings": settings})
    check_settings(NAME, report["settings"], settings)
    done = {tuple(run[name] for name in KEY) for run in report["runs"]}
    for run in wanted_runs(args):
        if tuple(run[name] for name in KEY) in done:
            continue
        report["runs"].append(run_one(run, args))
        report = with_provenance(report, __spec__.name, given)
        write_report(args.results, NAME, report, as_markdown(report))
        print({n: report["runs"][-1][n] for n in (*KEY, "validation", "test")}, flush=True)
    plot(report, args.results / f"{NAME}.png")


if __name__ == "__main__":
    main()
