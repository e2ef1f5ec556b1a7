"""Peak memory of each side of `init.py`, each measured in a process of its own. Linux only."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable

from transformers import PreTrainedModel

from peft_corda import CordaConfig, CordaFactors
from peft_corda.base_model.forward import Runner
from peft_corda.base_model.input_groups import discover
from peft_corda.base_model.targets import find_targets

from ..common.memory import RESET, STATUS, resident, settle
from ..common.records import in_child
from .sides import Sample, forward, load, run_ours, run_peft, time_forward

# "forward" is the floor: the batches are run through the model and nothing is kept.
SIDES = ("forward", "peft", "ours", "ours-least")


def least_memory(model: PreTrainedModel, sample: Sample) -> int:
    """The smallest `max_memory` with which one pass resumes from the hidden states of another.

    It holds the statistics of the largest layer, and the hidden states of all tokens.
    """
    config = CordaConfig(target_modules="all-linear", r=1)
    groups = discover(Runner(model, find_targets(model, config)), sample.batches[0]).groups
    tokens = sum(batch["input_ids"].numel() for batch in sample.batches)
    hidden = tokens * model.config.hidden_size * model.dtype.itemsize
    # A margin, as the length of batches to come is not known beforehand.
    return max(group.bytes() for group in groups) + int(1.3 * hidden)


def fingerprint(factors: CordaFactors) -> str:
    """A hash of all directions and singular values."""
    digest = hashlib.sha256()
    for name, module in factors.modules.items():
        digest.update(name.encode())
        for found in module.directions.values():
            for tensor in (found.U, found.S):
                digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def measure_child(model: PreTrainedModel, sample: Sample, args: argparse.Namespace) -> dict:
    """Run one side at one rank in this process, and record what it took."""
    rank, side = args.ranks[0], args.one
    limit = least_memory(model, sample) if side == "ours-least" else None
    # Memory that the libraries take once and keep is not a side's own.
    forward(model, sample.batches[:1])
    before = settle()
    factors = None
    if side == "forward":
        seconds = time_forward(model, sample.batches)
    elif side == "peft":
        seconds = run_peft(model, args.memory_method, rank, sample.singles)[0]["total"]
    else:
        options = {} if limit is None else {"max_memory": limit}
        times, factors = run_ours(model, args.memory_method, rank, sample.batches, **options)
        seconds = times["total"]
    above = resident("VmHWM") - before
    record = {"side": side, "before": before, "peak_above": above, "seconds": seconds}
    if factors is not None:
        record |= {"max_memory": limit or "default", "factors_sha256": fingerprint(factors)}
    return record


def measure_memory(
    args: argparse.Namespace, module: str, arguments: list[str], save: Callable[[dict], None]
) -> None:
    """Measure every side at every rank, each in a child process of this benchmark."""
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
            # If an option is given twice, the last one counts.
            in_child(module, [*arguments, "--ranks", str(rank)], side)
            for _ in range(args.memory_repeats)
            for side in args.sides
        ]
        hashes = {run["factors_sha256"] for run in runs if "factors_sha256" in run}
        cell = {"rank": rank, "identical_factors": len(hashes) == 1, "runs": runs}
        part["cells"].append(cell)
        print(json.dumps(cell), file=sys.stderr, flush=True)
        save(part)


def child_main(args: argparse.Namespace) -> None:
    """Measure what `--one` names, and print it."""
    model, samples = load(args, args.dtypes[0])
    print(json.dumps(measure_child(model, samples[0], args)))
