"""What pruning costs at other sizes: memory against depth, time and memory of BERT-base. Linux only.

    python -m benchmarks.kprune.scale

The models have random weights, random tokens and two classes. Each runs in a process of its own. Results
go to `benchmarks/results/kprune_scale.{json,md}` after every run. Started again, the benchmark resumes
with what is missing.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import torch
from transformers import BertConfig, BertForSequenceClassification

from kprune_ext import KPruneConfig, kprune

from ..common.command_line import add_child, add_results, add_threads, make_parser
from ..common.memory import MIB, resident, settle
from ..common.records import in_child, provenance, read_report, table, write_report

NAME = "kprune_scale"
VOCABULARY = 30_522
# Name: layers, hidden size, heads, neurons, calibration tokens.
MODELS = {
    "6 layers, 384 wide": (6, 384, 12, 1536, 12_000),
    "24 layers, 384 wide": (24, 384, 12, 1536, 12_000),
    "BERT-base": (12, 768, 12, 3072, 100_000),
}


def batches_of(tokens: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Batches of at least so many random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (-(-tokens // length), length), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(32)]


def measured(args: argparse.Namespace) -> dict:
    """Prune one model in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    layers, hidden, heads, neurons, tokens = MODELS[args.one]
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=neurons,
        num_labels=2,
    )
    model = BertForSequenceClassification(config).eval()
    batches = batches_of(tokens, args.length)
    before, cpu, wall = settle(), time.process_time(), time.perf_counter()
    options = KPruneConfig(reduction=args.reduction, max_tokens=tokens)
    pruned = kprune(model, batches, options, progress=False)
    report = pruned.kprune_report
    return {
        "model": args.one,
        "layers": layers,
        "tokens": report.tokens,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "extra_peak": resident("VmHWM") - before,
        "copy": sum(p.numel() * p.element_size() for p in model.parameters()),
        "whole_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "flops_kept": report.flops / report.flops_before,
    }


def as_markdown(report: dict) -> str:
    """A row per model."""
    rows = [
        [
            run["model"],
            f"{run['tokens']:,}",
            f"{run['wall_seconds'] / 60:.1f}",
            f"{run['cpu_seconds'] / 60:.1f}",
            f"{run['extra_peak'] / MIB:.0f}",
            f"{(run['extra_peak'] - run['copy']) / MIB:.0f}",
            f"{run['whole_peak'] / MIB:.0f}",
            f"{run['flops_kept']:.2%}",
        ]
        for run in report["runs"]
    ]
    head = "model, tokens, minutes, CPU minutes, extra MiB, without the copy, whole process, FLOPs kept"
    return (
        f"Random BERTs, sequences of {report['length']} tokens, {report['reduction']:.0%} pruned, "
        f"{report['threads']} thread(s). Peak of the memory in use above the loaded model and data; the "
        f"pruned model begins as a copy. `{report['command']}`\n\n" + table(head.split(", "), rows)
    )


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="Models.")
    add("--length", type=int, default=64, help="Tokens per sequence.")
    add("--reduction", type=float, default=0.8, help="Share of FLOPs to remove.")
    add_threads(parser, 1)
    add_results(parser)
    add_child(parser, choices=MODELS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    if args.one is not None:
        print(json.dumps(measured(args)))
        return
    runs = read_report(args.results, NAME, {"runs": []})["runs"]
    settings = {"length": args.length, "reduction": args.reduction, "threads": args.threads}
    for name in args.models:
        if name in [run["model"] for run in runs]:
            continue
        runs.append(in_child(__spec__.name, arguments, name))
        report = provenance(__spec__.name, arguments) | settings | {"runs": runs}
        write_report(args.results, NAME, report, as_markdown(report))
        print(as_markdown(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
