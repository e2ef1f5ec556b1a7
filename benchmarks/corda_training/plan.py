"""The memory that `peft-corda plan` forecasts, against what a calibration takes. Linux only.

    python -m benchmarks.corda_training.plan

SmolLM2-135M is calibrated on random tokens, in a process of its own for each setting. The peak of the
memory in use is compared with the forecast. It is measured above what the loaded model has in use, and
above what the numerical libraries keep for themselves once they have been used. Results go to
`benchmarks/results/corda_plan.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from peft_corda import CordaConfig, calibrate
from peft_corda.planning.forecast import estimate

from ..common.command_line import (
    add_child,
    add_language_model,
    add_results,
    add_threads,
    make_parser,
)
from ..common.memory import MIB, resident, settle
from ..common.models import load_model
from ..common.records import in_child, model_label, provenance, table, write_report

NAME = "corda_plan"
# What is freed goes back to the system at once, so that what is measured is what is in use.
PROMPT = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
# Rank, sequences per batch, max_memory in MiB (None: the default).
SETTINGS = [(32, 1, None), (32, 1, 24), (128, 1, None), (32, 8, None), (32, 1, 256), (32, 16, 64)]


def measured(args: argparse.Namespace) -> dict:
    """Forecast and calibrate in this process."""
    torch.set_num_threads(args.threads)
    rank, batch_size, limit = args.one
    model = load_model(args.model, torch.float32)
    generator = torch.Generator().manual_seed(0)
    shape = (args.sequences, args.length)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in ids.split(batch_size)
    ]
    config = CordaConfig(corda_method=args.method, r=rank, target_modules="all-linear")
    options = {} if limit is None else {"max_memory": limit * MIB}
    sizes = {"sequences": shape[0], "length": shape[1], "batch_size": batch_size}
    planned = estimate(model, config, **sizes, **options)
    # Memory that the libraries take once and keep: they are used on the first block alone.
    first = CordaConfig(corda_method=args.method, r=rank, target_modules=r".*layers\.0\..*_proj")
    calibrate(model, first, batches[:1], verbose=False)
    before = settle()
    calibrate(model, config, batches, verbose=False, **options)
    peak = resident("VmHWM") - before
    return {
        "rank": rank,
        "batch_size": batch_size,
        "max_memory_mib": limit,
        "passes": planned.passes,
        "planned": planned.to_dict(),
        "measured_peak": peak,
    }


def as_markdown(report: dict) -> str:
    """The table."""
    rows = [
        [
            str(run["rank"]),
            str(run["batch_size"]),
            "default" if run["max_memory_mib"] is None else f"{run['max_memory_mib']} MiB",
            str(run["passes"]),
            f"{run['planned']['peak'] / MIB:.0f}",
            f"{run['measured_peak'] / MIB:.0f}",
            f"{run['planned']['peak'] / run['measured_peak'] - 1:+.0%}",
        ]
        for run in report["runs"]
    ]
    head = "r, batch, max_memory, passes, planned MiB, measured MiB, difference"
    return (
        f"{report['model']}, {report['sequences']} sequences of {report['length']} tokens, "
        f"{report['method']}, float32; peaks above the loaded model and libraries. "
        f"`{report['command']}`\n\n" + table(head.split(", "), rows)
    )


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_language_model(parser)
    add("--method", choices=["kpm", "ipm"], default="kpm", help="Method.")
    add("--sequences", type=int, default=16, help="Number of sequences.")
    add("--length", type=int, default=256, help="Tokens per sequence.")
    add_threads(parser, 1)
    add_results(parser)
    add_child(parser, type=json.loads)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    if args.one is not None:
        print(json.dumps(measured(args)))
        return
    report = provenance(__spec__.name, arguments) | {
        "model": model_label(args.model),
        **{name: getattr(args, name) for name in ("sequences", "length", "method")},
        "runs": [],
    }
    for setting in SETTINGS:
        run = in_child(__spec__.name, arguments, json.dumps(setting), **PROMPT)
        report["runs"].append(run)
        write_report(args.results, NAME, report, as_markdown(report))
    print(as_markdown(report))


if __name__ == "__main__":
    main(sys.argv[1:])
