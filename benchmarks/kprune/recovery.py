"""What an adapter wins back after pruning: K-prune, then nothing, LoRA or CorDA for one epoch.

    python benchmarks/kprune_recovery.py --data DATA --checkpoints FOLDER

Prunes the fine-tuned MiniLM-L6 of `kprune_accuracy.py` (made if it is not in `--checkpoints`) and trains
an adapter on every linear layer that is left. The rate of each method and reduction is the one that
is best on the validation set; the test set is reported. Writes `results/kprune_recovery.{json,md,png}`
after every run; started again, it goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kprune_accuracy import dense_model, source_of, speed
from kprune_tasks import TASKS, calibration, common_parser, evaluate, read, train
from peft import LoraConfig, get_peft_model
from study import as_code, model_label, table, with_provenance, write_report
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed

from kprune_ext import KPruneConfig, kprune
from peft_corda import CordaConfig, calibrate

NAME = "kprune_recovery"
RATES = {"none": [0.0], "lora": [3e-4, 1e-3, 3e-3], "corda": [1e-4, 3e-4, 1e-3]}
KEY = ("task", "reduction", "after", "rate", "seed")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument("--task", choices=["sst2", "mrpc", "stsb"], default="sst2")
    parser.add_argument("--reductions", nargs="+", type=float, default=[0.4, 0.6, 0.8])
    parser.add_argument("--after", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--rates", nargs="+", type=float, help="in place of each method's own")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="of the sample, and of training"
    )
    parser.add_argument("--tokens", type=int, default=12_000, help="that are pruned with")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapter-epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="of timing; 0 for none")
    return parser.parse_args(given)


def pruned_model(reduction: float, seed: int, args: argparse.Namespace) -> PreTrainedModel:
    """The pruned model, kept beside the dense one for the next run."""
    folder = args.checkpoints / f"{args.task}-{reduction:g}-{args.tokens}-{seed}"
    if not (folder / "config.json").exists():
        model, tokenizer = dense_model(args.task, args)
        rows = read(args.data, args.task, "train", args.limit)
        batches = calibration(TASKS[args.task], tokenizer, rows, seed)
        config = KPruneConfig(reduction=reduction, max_tokens=args.tokens, seed=seed)
        kprune(model, batches, config, progress=False).save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def adapt(model: PreTrainedModel, run: dict[str, Any], batches: Any, args: Any) -> torch.nn.Module:
    """A LoRA or CorDA (ipm) adapter on the encoder's linear layers; the head is trained as well."""
    targets = [
        f"{model.base_model_prefix}.{name}"
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layer." in f".{name}" and module.weight.numel()
    ]
    common = {
        "r": args.rank,
        "lora_alpha": args.rank,
        "target_modules": targets,
        "task_type": "SEQ_CLS",
    }
    if run["after"] == "lora":
        return get_peft_model(model, LoraConfig(**common))
    config = CordaConfig(corda_method="ipm", **common)
    calibrate(model, config, batches)
    return get_peft_model(model, config)


def run_one(run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Train (or not) and measure, on validation and test set, in percent."""
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
    make = partial(dict, task=args.task)
    runs = [make(reduction=0.0, after="none", rate=0.0, seed=0)]
    for seed in args.seeds:
        for reduction in args.reductions:
            for after in args.after:
                rates = args.rates if args.rates and after != "none" else RATES[after]
                runs += [make(reduction=reduction, after=after, rate=r, seed=seed) for r in rates]
    return runs


def best_rates(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each reduction and method the runs, one a seed, with the rate that validation prefers.

    Rates that were not run with every seed of the method are compared by the seeds they have.
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
    rows = []
    for runs in best_rates(report["runs"]):
        first, tests = runs[0], [run["test"] for run in runs]
        error = f" ± {statistics.stdev(tests) / len(tests) ** 0.5:.1f}" if len(tests) > 1 else ""
        timed = [run["latency_32"]["speedup"] for run in runs if "latency_32" in run]
        rows.append(
            [
                f"{first['reduction']:.0%}",
                first["after"],
                f"{first['rate']:g}" if first["rate"] else "–",
                f"{statistics.mean(run['validation'] for run in runs):.1f}",
                f"{statistics.mean(tests):.1f}{error}",
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


def plot(report: dict[str, Any], path: Path) -> None:
    """What the test set says against how much was pruned, and against the latency."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    chosen = best_rates(report["runs"])
    timed = [run for run in report["runs"] if "latency_32" in run]
    for after in RATES:
        points = [
            (
                first["reduction"],
                statistics.mean(run["test"] for run in runs),
                [r["latency_32"]["speedup"] for r in timed if r["reduction"] == first["reduction"]],
            )
            for runs in chosen
            if (first := runs[0])["after"] == after and first["reduction"]
        ]
        panels[0].plot([100 * p[0] for p in points], [p[1] for p in points], "o-", label=after)
        quick = [(statistics.median(p[2]), p[1]) for p in points if p[2]]
        panels[1].plot([p[0] for p in quick], [p[1] for p in quick], "o-", label=after)
    dense = statistics.mean(run["test"] for runs in chosen for run in runs if not run["reduction"])
    metric = TASKS[report["settings"]["task"]].main
    for panel, label in zip(panels, ("pruned, % of FLOPs", "times faster, 32 × 64"), strict=True):
        panel.axhline(dense, color="grey", linewidth=0.5)
        panel.set(xlabel=label, ylabel=f"{metric}, test")
        panel.legend(fontsize="x-small", title="pruned, then")
    figure.savefig(path, dpi=120)


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    torch.set_num_threads(args.threads)
    path = args.results / f"{NAME}.json"
    label = "MiniLM-L6" if args.model is None else model_label(source_of(args))
    settings = {"model": label} | {
        n: getattr(args, n) for n in ("task", "tokens", "rank", "adapter_epochs")
    }
    report = json.loads(path.read_text()) if path.exists() else {"runs": [], "settings": settings}
    if report["settings"] != settings:
        sys.exit(
            f"{path} is of another study: {report['settings']}. Move it away, or pass --results."
        )
    done = {tuple(run[name] for name in KEY) for run in report["runs"]}
    for run in wanted_runs(args):
        if tuple(run[name] for name in KEY) in done:
            continue
        report["runs"].append(run_one(run, args))
        report = with_provenance(report, __file__, given)
        write_report(args.results, NAME, report, as_markdown(report))
        print({n: report["runs"][-1][n] for n in (*KEY, "validation", "test")}, flush=True)
    plot(report, args.results / f"{NAME}.png")


if __name__ == "__main__":
    main()
