"""Peak memory of each side of `corda_init.py`, each in a process of its own. Linux only."""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from corda_init_sides import Sample, forward, load, run_ours, run_peft, time_forward
from transformers import PreTrainedModel

from peft_corda import CordaConfig, CordaFactors
from peft_corda.base_model.input_groups import discover
from peft_corda.base_model.targets import find_targets

# "forward" is the floor: the batches are run through the model and nothing is kept.
SIDES = ("forward", "peft", "ours", "ours-least")
STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (the most so far)."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def settle() -> int:
    """Give freed memory back to the system, forget the peak so far, and say what is left in use.

    Memory that loading the model has freed would else be used again unseen.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")
    before, peak = resident("VmRSS"), resident("VmHWM")
    if peak > before + 16 * 2**20:
        raise RuntimeError("the kernel did not reset the peak of memory in use")
    return before


def least_memory(model: PreTrainedModel, sample: Sample) -> int:
    """The smallest `max_memory` at which hidden states are carried from pass to pass.

    The statistics of the largest layer, and the hidden states of all tokens.
    """
    config = CordaConfig(target_modules="all-linear", r=1)
    groups = discover(model, find_targets(model, config), sample.batches[0]).groups
    tokens = sum(batch["input_ids"].numel() for batch in sample.batches)
    hidden = tokens * model.config.hidden_size * model.dtype.itemsize
    # A margin, as the length of batches to come is not known beforehand.
    return max(group.bytes() for group in groups) + int(1.3 * hidden)


def fingerprint(factors: CordaFactors) -> str:
    digest = hashlib.sha256()
    for name, module in factors.modules.items():
        digest.update(name.encode())
        for found in module.directions.values():
            for tensor in (found.U, found.S):
                digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def measure_child(model: PreTrainedModel, sample: Sample, args: argparse.Namespace) -> dict:
    """Run one side at one rank in this process, and say what it took."""
    rank = args.ranks[0]
    limit = least_memory(model, sample) if args.child == "ours-least" else None
    # Memory that the libraries take once and for all is not a side's own.
    forward(model, sample.batches[:1])
    before = settle()
    factors = None
    if args.child == "forward":
        seconds = time_forward(model, sample.batches)
    elif args.child == "peft":
        seconds = run_peft(model, args.memory_method, rank, sample.singles)[0]["total"]
    else:
        options = {} if limit is None else {"max_memory": limit}
        times, factors = run_ours(model, args.memory_method, rank, sample.batches, **options)
        seconds = times["total"]
    above = resident("VmHWM") - before
    record = {"side": args.child, "before": before, "peak_above": above, "seconds": seconds}
    if factors is not None:
        record |= {"max_memory": limit or "default", "factors_sha256": fingerprint(factors)}
    return record


def run_child(side: str, rank: int, arguments: list[str]) -> dict:
    """The script again, with the same arguments, as a child that measures one side."""
    script = Path(__file__).with_name("corda_init.py")
    command = [sys.executable, str(script), *arguments]
    # The last of an option that comes twice counts.
    command += ["--child", side, "--ranks", str(rank)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(
    args: argparse.Namespace, arguments: list[str], save: Callable[[dict], None]
) -> None:
    if not RESET.exists():
        sys.exit(f"The memory part reads {STATUS} and writes {RESET}, which only Linux has.")
    part: dict = {
        "dtype": args.dtypes[0],
        "method": args.memory_method,
        "repeats": args.memory_repeats,
        "cells": [],
    }
    for rank in args.ranks:
        runs = [
            run_child(side, rank, arguments)
            for _ in range(args.memory_repeats)
            for side in args.sides
        ]
        hashes = {run["factors_sha256"] for run in runs if "factors_sha256" in run}
        cell = {"rank": rank, "identical_factors": len(hashes) == 1, "runs": runs}
        part["cells"].append(cell)
        print(json.dumps(cell), file=sys.stderr, flush=True)
        save(part)


def child_main(args: argparse.Namespace) -> None:
    model, samples = load(args, args.dtypes[0])
    print(json.dumps(measure_child(model, samples[0], args)))
