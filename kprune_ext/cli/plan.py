"""The subcommand `kprune plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..common.files import check_output_files, write_json
from ..planning import PruningPlan, plan_pruning
from ..preparation.config import KPruneConfig
from .inputs import check_device

if TYPE_CHECKING:
    from .options import PlanOptions


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
    if options.json is not None:
        write_json(options.json, plan.to_dict(), indent=2)
    print(plan)
    return plan
