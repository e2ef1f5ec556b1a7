"""All parts of the GPU study, in the order of their worth, each in a process with a time limit.

    python -m benchmarks.gpu.suite
    python -m benchmarks.gpu.suite --parts start step --minutes 4
    python -m benchmarks.gpu.suite --device cpu --tiny

Every part writes `benchmarks/results/gpu_NAME.{json,md}` after every measurement. A part that is cut off
by its limit, or by the end of the time for all of them, keeps what it has measured; called again, the
suite resumes with what is missing. The study of training needs a model and data (`--model`, `--data`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from .cells import checked_device, part_parser, started_report

# Seconds that a part may take, in the order in which the parts are run.
LIMITS = {"device_tests": 90, "start": 130, "step": 90, "pruning": 70, "study": 240}
DATA_PARTS = ("study",)


def command_of(name: str, args: argparse.Namespace) -> list[str]:
    """The command line of one part."""
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--device", args.device]
    command += ["--results", str(args.results)]
    if args.tiny:
        command.append("--tiny")
    if name in DATA_PARTS:
        command += ["--model", str(args.model), "--data", str(args.data)]
    return command


def run_part(name: str, args: argparse.Namespace, seconds: float) -> str:
    """Run one part, and say how it ended."""
    if started_report(args.results, f"gpu_{name}", torch.device(args.device)).get("finished"):
        return "finished before"
    if name in DATA_PARTS and (args.model is None or args.data is None):
        return "left out: it needs --model and --data"
    if seconds < 5:
        return "left out: the time is used up"
    start = time.perf_counter()
    try:
        status = subprocess.run(command_of(name, args), timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds:.0f} s; call again to resume"
    end = f"{time.perf_counter() - start:.0f} s"
    return f"done in {end}" if status == 0 else f"ended with status {status} after {end}"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = part_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), help="Parts to run.")
    add("--minutes", type=float, default=9.0, help="Minutes for all parts together.")
    add("--model", type=Path, help="Language model of the training study: a folder or a GGUF file.")
    add(
        "--data",
        type=Path,
        help="Folder of the training study's data (see corda_training.finetune).",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    checked_device(args.device)
    end = time.perf_counter() + 60 * args.minutes
    outcome = {}
    for name in args.parts:
        left = end - time.perf_counter()
        outcome[name] = run_part(name, args, min(LIMITS[name], left))
        print(f"== {name}: {outcome[name]}", flush=True)
    print(*(f"{name}: {text}" for name, text in outcome.items()), sep="\n")
    if any("status" in text for text in outcome.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
