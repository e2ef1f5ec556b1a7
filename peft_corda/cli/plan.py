"""The subcommand `peft-corda plan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig

from kprune_ext.common.command_line import TASKS
from kprune_ext.common.memory import bytes_of_limit
from kprune_ext.console.rates import duration, product_rate, seconds_per_call
from kprune_ext.files.writing import check_output_files, write_json

from ..config import CordaConfig
from ..decomposition.cost import total_arithmetic
from ..decomposition.directions import METHODS, decompose
from ..planning.forecast import Estimate, estimate
from .base_model import PEFT_TYPES

if TYPE_CHECKING:
    from .options import PlanOptions

# Size of the layer whose decomposition is timed.
_WIDTH = 512
# How often the limit is doubled in search of one that halves the passes.
_DOUBLINGS = 4


def run_plan(options: PlanOptions) -> Estimate:
    """Run `peft-corda plan`, which prints the estimate and optionally writes it as JSON.

    Raises:
        ValueError, OSError: If `estimate` raises them, or if no such config exists; nothing is
            written then.
    """
    check_output_files({"json": options.json}, {"model": options.model})
    methods = METHODS if options.corda_method == "both" else (options.corda_method,)
    config = CordaConfig(
        r=options.r,
        corda_method=methods[0],
        target_modules=options.target_modules,
        exclude_modules=options.exclude_modules,
        task_type=PEFT_TYPES[options.task],
    )
    about = AutoConfig.from_pretrained(options.model)
    own = getattr(about, "dtype", None) or torch.float32
    dtype = own if options.dtype == "auto" else getattr(torch, options.dtype)
    with init_empty_weights(include_buffers=True):
        model = getattr(transformers, TASKS[options.task]).from_config(about).to(dtype)
    within = partial(
        estimate,
        model,
        config,
        sequences=options.num_samples,
        length=options.max_length,
        batch_size=options.batch_size,
        gpus=options.gpus,
        methods=methods,
    )
    found = within(max_memory=bytes_of_limit(options.max_memory))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = seconds_of(found, dtype, device, min(options.r, _WIDTH), methods)
    if options.json is not None:
        write_json(options.json, found.to_dict() | {"seconds": seconds, "device": device.type})
    print(found)
    machine = "this machine" if options.gpus == 1 else f"{options.gpus} machines like this one"
    print(f"Takes {duration(seconds)} on {machine} ({device.type}), by rates measured just now.")
    if (advice := fewer_passes(found, lambda limit: within(max_memory=limit))) is not None:
        by_default = (
            "" if options.max_memory else " By default, calibrate takes half of the free memory."
        )
        print(advice + by_default)
    return found


def seconds_of(
    found: Estimate, dtype: torch.dtype, device: torch.device, rank: int, methods: Sequence[str]
) -> float:
    """Returns the seconds of a calibration, from rates that are measured on this machine.

    Args:
        found: The estimate.
        dtype: Dtype of the model.
        device: Device to measure on.
        rank: Rank of the decomposition that is timed.
        methods: Its methods.
    """
    weight = torch.randn(_WIDTH, _WIDTH, device=device, generator=torch.Generator(device))
    factor = weight @ weight.T / _WIDTH
    decomposing = sum(
        seconds_per_call(partial(decompose, weight, factor, rank, method), device)
        for method in methods
    )
    arithmetic = total_arithmetic([((_WIDTH, _WIDTH), rank)], methods)
    running = found.forward_flops / product_rate(device, dtype)
    summing = found.statistics_flops / product_rate(device, torch.float32)
    decompositions = found.decomposition_flops * found.decomposition_share
    return (running + summing) / found.gpus + decompositions * decomposing / arithmetic


def fewer_passes(found: Estimate, within: Callable[[int], Estimate]) -> str | None:
    """Says which memory limit at least halves the passes; None if one pass is planned, or none does.

    Args:
        found: The estimate.
        within: Gives the estimate within a memory limit in bytes.
    """
    limit = found.statistics + found.hidden_states
    for _ in range(_DOUBLINGS if found.passes > 1 else 0):
        limit *= 2
        other = within(limit)
        if other.passes <= -(-found.passes // 2):
            return (
                f"With --max_memory {-(-limit // 2**20)}MiB, {other.passes} "
                f"{'passes do' if other.passes > 1 else 'pass does'} instead of {found.passes}."
            )
    return None
