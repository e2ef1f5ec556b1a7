"""The subcommand `peft-corda plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig

from kprune_ext.common.command_line import TASKS
from kprune_ext.common.files import check_output_files
from kprune_ext.common.memory import bytes_of_limit

from ..calibration.forecast import Estimate, estimate
from ..config import CordaConfig
from ..decomposition.directions import METHODS
from .base_model import PEFT_TYPES

if TYPE_CHECKING:
    from .options import PlanOptions


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
    found = estimate(
        model,
        config,
        sequences=options.num_samples,
        length=options.max_length,
        batch_size=options.batch_size,
        max_memory=bytes_of_limit(options.max_memory),
        gpus=options.gpus,
        methods=methods,
    )
    if options.json is not None:
        found.save_json(options.json)
    print(found)
    return found
