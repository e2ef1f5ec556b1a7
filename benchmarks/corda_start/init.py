"""Time, memory and accuracy of where a CorDA adapter starts: `peft_corda.calibrate` against PEFT's own
`preprocess_corda`.

    python -m benchmarks.corda_start.init               # all parts, packaged model, built-in text
    python -m benchmarks.corda_start.init --parts memory
    python -m benchmarks.corda_start.init --parts time --dtypes float32 bfloat16 \\
        --text wiki.txt --questions questions.jsonl --field question

There are three parts. time: both sides run in one process, in turn, with the same model and data. Ours
is timed for each method and rank. PEFT's is timed once a round for all of them, because its statistics
depend on neither, and it always takes the full decomposition and crops it. memory: each side runs at
each rank in a process of its own. layers: single synthetic layers at the sizes of 7B models; with
--quality, also the energy of the directions found, relative to a float64 optimum.

Results go to `benchmarks/results/corda_init.json` after every cell, and to Markdown tables beside it.
Parts that are not run keep their results.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..common.command_line import add_child, add_language_model, add_threads, make_parser
from ..common.records import RESULTS, model_label, provenance, read_report, write_report
from .layers import measure_layer
from .memory import SIDES, child_main, measure_memory
from .sides import (
    Sample,
    forward,
    gemm_rate,
    in_turn,
    least_flops,
    load,
    run_ours,
    run_peft,
    time_forward,
)
from .tables import as_markdown

PARTS = ("time", "memory", "layers")
METHODS = ("kpm", "ipm")
LAYER_SHAPES = ("4096x4096", "11008x4096", "4096x11008")
DTYPES = ("float32", "bfloat16", "float16")


class TimeCell:
    """All times of one precision and data set, over several rounds."""

    def __init__(
        self, model: PreTrainedModel, dtype: str, sample: Sample, ranks: list[int]
    ) -> None:
        self.model, self.sample = model, sample
        self.jobs = [(method, rank) for method in METHODS for rank in ranks]
        self.forward: dict[str, list] = {
            "batched": [],
            "one by one": [],
            "one by one, with head": [],
        }
        self.ours: dict[str, list] = {f"{method} r={rank}": [] for method, rank in self.jobs}
        self.peft: list = []
        self.modules = {0}  # numbers of modules seen, to make sure that both sides did the same
        self.dtype = dtype
        self.rates: dict[str, float] = {}  # of float32 sums, and of the model's products

    def round(self, number: int) -> None:
        """Measure everything once."""
        forward(self.model, self.sample.singles[:1])
        for name in ("float32", self.dtype):
            rate = gemm_rate(getattr(torch, name))
            self.rates[name] = max(rate, self.rates.get(name, 0.0))
        in_turn(number, [self.run_ours, self.run_peft, self.run_forward])

    def run_forward(self) -> None:
        """Measure forward passes alone."""
        batches, singles = self.sample.batches, self.sample.singles
        self.forward["batched"].append(time_forward(self.model, batches))
        self.forward["one by one"].append(time_forward(self.model, singles))
        self.forward["one by one, with head"].append(time_forward(self.model, singles, head=True))

    def run_ours(self) -> None:
        """Measure `peft_corda` with each method and rank."""
        for method, rank in self.jobs:
            phases, factors = run_ours(self.model, method, rank, self.sample.batches)
            self.ours[f"{method} r={rank}"].append(phases)
            self.modules.add(len(factors.modules))

    def run_peft(self) -> None:
        """Measure PEFT with one method and rank, which stand for all."""
        method, rank = self.jobs[-1]
        phases, modules = run_peft(self.model, method, rank, self.sample.singles)
        self.peft.append(phases)
        self.modules.add(modules)

    def record(self) -> dict:
        """What the report keeps of this cell."""
        if len(self.modules) != 2:
            raise RuntimeError(f"the sides saw different numbers of modules: {self.modules}")
        method, rank = self.jobs[-1]
        return {
            "dtype": self.dtype,
            **self.sample.describe(),
            "modules": max(self.modules),
            "forward": self.forward,
            "least_flops": least_flops(self.model, self.sample),
            "flops_per_second": self.rates,
            "ours": self.ours,
            "peft": self.peft,
            "peft_shared": f"measured with {method}, r={rank}; stands for all methods and ranks",
        }


def measure_time(args: argparse.Namespace, save: Callable[[dict], None]) -> None:
    """Measure every precision and data set."""
    part: dict = {"repeats": args.repeats, "cells": []}
    for dtype in args.dtypes:
        model, samples = load(args, dtype)
        for sample in samples:
            cell = TimeCell(model, dtype, sample, args.ranks)
            for number in range(args.repeats):
                cell.round(number)
                print(f"{dtype}, {sample.name}: round {number + 1}", file=sys.stderr, flush=True)
            part["cells"].append(cell.record())
            save(part)


def measure_layers(args: argparse.Namespace, save: Callable[[dict], None]) -> None:
    """Measure every shape with every kind of covariance."""
    part: dict = {"repeats": args.repeats, "cells": []}
    for shape in args.shapes:
        for kind in args.covariances:
            part["cells"].append(measure_layer(shape, kind, args))
            save(part)


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment(args: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Where the figures of one part come from."""
    return provenance(__spec__.name, arguments) | {
        "model": model_label(args.model),
        "text": args.text.name if args.text else "Python's language manual",
        "questions": args.questions.name if args.questions else "sentences of Python's manual",
        "cpu": cpu_name(),
    }


def save_part(report: Path, name: str, part: dict) -> None:
    """Put one part into the report, and write it and its tables anew."""
    parts = read_report(report.parent, report.stem, {}) | {name: part}
    parts = {name: parts[name] for name in sorted(parts)}
    write_report(report.parent, report.stem, parts, as_markdown(parts))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", default=PARTS, choices=PARTS, help="Parts to run.")
    add_language_model(parser)
    add("--dtypes", nargs="+", default=["float32"], choices=DTYPES, help="Precisions.")
    add("--ranks", nargs="+", type=int, default=[32, 128], help="Ranks.")
    add("--repeats", type=int, default=3, help="Number of rounds.")
    add_threads(parser, 1)
    add("--text", type=Path, help="Text file for the sequences; by default Python's manual.")
    add("--questions", type=Path, help="JSON Lines file; by default sentences of Python's manual.")
    add("--field", default="question", help="Field of the questions file to read.")
    add("--sequences", type=int, default=16, help="Number of sequences.")
    add("--length", type=int, default=256, help="Tokens per sequence.")
    add("--batch-size", type=int, default=8, help="Sequences per batch, on our side.")
    add("--question-counts", nargs="*", type=int, default=[64, 256], help="Numbers of questions.")
    add("--question-batch-size", type=int, default=32, help="Questions per batch, on our side.")
    add("--sides", nargs="+", default=SIDES, choices=SIDES, help="Sides in the memory part.")
    add("--memory-method", default="kpm", choices=METHODS, help="Method in the memory part.")
    add("--memory-repeats", type=int, default=1, help="Number of rounds in the memory part.")
    add("--shapes", nargs="+", default=LAYER_SHAPES, help="Shapes of single layers, OUTxIN.")
    kinds = ["full", "few"]
    add("--covariances", nargs="+", default=kinds, choices=kinds, help="Kinds of covariances.")
    add("--layer-rank", type=int, default=128, help="Rank for single layers.")
    add("--quality", action="store_true", help="Also judge single layers; takes minutes for each.")
    report = RESULTS / "corda_init.json"
    add("--report", type=Path, default=report, help="JSON file to write or to add to.")
    add_child(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    if args.one is not None:
        child_main(args)
        return
    about = environment(args, arguments)
    for name in args.parts:

        def save(part: dict, name: str = name) -> None:
            save_part(args.report, name, {"environment": about, **part})

        if name == "time":
            measure_time(args, save)
        elif name == "memory":
            measure_memory(args, __spec__.name, arguments, save)
        else:
            measure_layers(args, save)


if __name__ == "__main__":
    main(sys.argv[1:])
