"""The subcommand `kprune plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..command_inputs.inputs import check_device
from ..console.rates import duration, product_rate
from ..files.writing import check_output_files, write_json
from ..planning import PruningPlan, plan_pruning
from ..preparation.config import KPruneConfig

if TYPE_CHECKING:
    from ..command_inputs.options import PlanOptions


def run_plan(options: PlanOptions) -> PruningPlan:
    """Runs `kprune plan`: prints what a run will take, from the model's config alone.

    Raises:
        ValueError, OSError: If an option is invalid, or the model cannot be pruned.
    """
    check_output_files({"json": options.json}, {"model": options.model})
    config = KPruneConfig(
        reduction=options.reduction,
        metric=options.metric,
        layout=options.layout,
        schedule=options.schedule,
        max_tokens=options.max_tokens,
    )
    check_device(options.device)
    about: Any = AutoConfig.from_pretrained(options.model, revision=options.revision)
    stored = getattr(about, "dtype", None) or torch.float32
    dtype = stored if options.dtype == "auto" else getattr(torch, options.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(about, dtype=dtype)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = plan_pruning(model, config, length=options.max_length, device=device)
    where = torch.device(device)
    rate = product_rate(where, dtype)
    if options.json is not None:
        write_json(options.json, plan.to_dict() | {"seconds": plan.flops / rate}, indent=2)
    print(plan)
    print(
        f"Takes {duration(plan.flops / rate)} on this machine ({where.type}), by a rate measured just "
        f"now ({rate / 1e9:,.0f} GFLOP/s)."
    )
    return plan
