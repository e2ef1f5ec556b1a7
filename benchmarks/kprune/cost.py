"""What K-prune costs with its defaults and the paper's way, and which default saves what. Linux only.

    python -m benchmarks.kprune.cost --data DATA --checkpoints FOLDER

All ways share one task, checkpoint, sample and number of threads. They run one after the other, each
in a process of its own. Results go to `benchmarks/results/kprune_cost.{json,md}` after every one.
Started again, the benchmark resumes with what is missing. See `accuracy.py` for data and checkpoints.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from typing import Any

import torch
from transformers import PreTrainedModel

from kprune_ext import KPruneConfig, kprune

from ..common.command_line import add_child
from ..common.memory import MIB, resident, settle
from ..common.records import (
    as_code,
    in_child,
    read_report,
    table,
    with_provenance,
    write_report,
)
from .fine_tuning import common_parser, dense_model, evaluate
from .tasks import TASKS, calibration, read

NAME = "kprune_cost"
FORWARD, PAPER, DEFAULT = "forward", "paper", "default"
_MEANT = KPruneConfig().meant_for(is_causal=False, next_tokens=False)
_ONCE = {"schedule": _MEANT.schedule}
_FEWER = _ONCE | {"score_fraction": _MEANT.score_fraction}
# Each way adopts one more of the defaults; None stands for the defaults themselves.
WAYS: dict[str, dict[str, Any] | None] = {
    PAPER: {},
    "paper, knowledge once a layer": _ONCE,
    "paper, knowledge once a layer, on part of the sample": _FEWER,
    DEFAULT: None,
}


def arguments(given: list[str] | None = None) -> Namespace:
    """The options."""
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, default="sst2", help="Task.")
    add("--reduction", type=float, default=0.8, help="Share of FLOPs to remove.")
    tokens = "Greatest size of the calibration sample, in tokens."
    add("--tokens", type=int, default=100_000, help=tokens)
    add("--seed", type=int, default=0, help="Seed of the calibration sample.")
    add_child(parser, choices=[FORWARD, *WAYS])
    return parser.parse_args(given)


def measured(args: Namespace) -> dict[str, Any]:
    """Measure CPU seconds, peak memory above model and data, and the result on the validation set."""
    torch.set_num_threads(args.threads)
    task = TASKS[args.task]
    model, tokenizer = dense_model(args.task, args)
    train = read(args.data, args.task, "train", args.limit)
    batches = list(calibration(task, tokenizer, train, args.seed))
    common = {"reduction": args.reduction, "max_tokens": args.tokens, "seed": args.seed}
    for parameter in model.parameters():  # weights are read from their file at the first use
        parameter.sum()
    before, cpu, wall = settle(), time.process_time(), time.perf_counter()
    if args.one == FORWARD:
        tokens = forward(model, batches, args.tokens)
        return {"way": args.one, "tokens": tokens, "cpu_seconds": time.process_time() - cpu}
    own = WAYS[args.one]
    config = KPruneConfig(**common) if own is None else KPruneConfig.paper(**(common | own))
    config = config.meant_for(is_causal=False, next_tokens=False)
    pruned = kprune(model, batches, config, progress=False)
    return {
        "way": args.one,
        "tokens": pruned.kprune_report.tokens,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "extra_peak": resident("VmHWM") - before,
        "flops_kept": pruned.kprune_report.flops / pruned.kprune_report.flops_before,
        "options": config.to_dict(),
        "result": evaluate(
            task, tokenizer, pruned, read(args.data, args.task, "validation", args.limit)
        )[task.main],
    }


@torch.no_grad()
def forward(
    model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], most: int, size: int = 2048
) -> int:
    """Run the encoder over at most `most` tokens, in batches of equal length; returns their number."""
    samples: dict[int, list[dict[str, torch.Tensor]]] = {}
    tokens = 0
    for batch in batches:
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            if tokens + length > most:
                continue
            tokens += length
            one = {name: values[row : row + 1, :length] for name, values in batch.items()}
            samples.setdefault(length, []).append(one)
    for length, members in samples.items():
        rows = max(1, size // length)
        for start in range(0, len(members), rows):
            part = members[start : start + rows]
            model.base_model(**{name: torch.cat([one[name] for one in part]) for name in part[0]})
    return tokens


def as_markdown(report: dict[str, Any]) -> str:
    """A row per way."""
    ways = {run["way"]: run for run in report["runs"]}
    paper = ways.get(PAPER)
    main = TASKS[report["task"]].main
    rows = []
    for name in (name for name in WAYS if name in ways):
        run = ways[name]
        less, smaller = "–", "–"
        if paper is not None:
            less = f"{paper['cpu_seconds'] / run['cpu_seconds']:.2f}×"
            smaller = f"{run['extra_peak'] / paper['extra_peak']:.0%}"
        peak = f"{run['extra_peak'] / MIB:.0f}"
        result = f"{run['result']:.1f}"
        rows.append([name, f"{run['cpu_seconds']:.0f}", less, peak, smaller, result])
    head = ["way", "CPU s", "paper / this", "extra MiB", "of the paper's", f"validation {main}"]
    text = (
        f"MiniLM-L6 on {report['task']}, {report['reduction']:.0%} pruned, one sample of "
        f"{report['tokens']:,} tokens at most, {report['threads']} thread(s). Memory is the peak above "
        f"the loaded model and data. {as_code(report)}\n\n{table(head, rows)}"
    )
    if FORWARD in ways:
        once = ways[FORWARD]["cpu_seconds"]
        text += (
            f"\nOne forward pass of the dense encoder over the same sample takes {once:.0f} CPU s. All "
            "ways here keep the hidden states of the current sub-layer, the paper's too, so that is no "
            "part of the ratios; without them every sub-layer would begin with the passes of both "
            "models up to it, half a forward pass each in the mean.\n"
        )
    return text


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    args = arguments(given)
    if args.one is not None:
        print(json.dumps(measured(args)))
        return
    dense_model(args.task, args)  # fine-tuned here, if it is not there yet
    report = read_report(args.results, NAME, {"runs": []})
    settings = {name: getattr(args, name) for name in ("task", "reduction", "tokens", "threads")}
    for name in (FORWARD, *WAYS):
        if name in [run["way"] for run in report["runs"]]:
            continue
        runs = [*report["runs"], in_child(__spec__.name, given, name)]
        report = with_provenance(report, __spec__.name, given) | settings | {"runs": runs}
        write_report(args.results, NAME, report, as_markdown(report))
        print(as_markdown(report), flush=True)


if __name__ == "__main__":
    main()
