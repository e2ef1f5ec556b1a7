"""`calibrate`: from a model and calibration data to factors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import (
    extract_model_from_parallel,
    send_to_device,
)
from peft import PeftModel
from torch import nn

from kprune_ext.common.memory import bytes_of_limit, trim_memory
from kprune_ext.common.placement import sharding_of
from kprune_ext.common.processes import Processes

from ..base_model.batches import count_of, digest_of, first_example
from ..base_model.forward import Runner
from ..base_model.input_groups import discover, with_cross
from ..base_model.targets import find_targets
from ..config import CordaConfig
from ..decomposition.directions import METHODS
from ..factors import CordaFactors, ModuleFactors
from .checkpoint import Checkpoint, identity
from .collect import PassOptions, collect_covariances
from .decompose import factorise
from .plan import Plan, make_plan


def calibrate(
    model: nn.Module,
    config: CordaConfig,
    dataloader: Iterable[Mapping[str, Any]],
    max_memory: int | str | None = None,
    *,
    methods: Sequence[str] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 120.0,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    verbose: bool | None = None,
) -> CordaFactors:
    """Find the directions that the adapters of `config` start from (CorDA, Section 3).

    Args:
        model: Base model, or a `PeftModel` around it (which is run with its adapters as they are). It
            may also be wrapped by `DistributedDataParallel`, sharded by `fully_shard` or DeepSpeed
            ZeRO-3, or offloaded by accelerate. Its weights, mode, hooks and gradients are left as
            they were.
        config: Config whose target modules, ranks, method, weighting and damping are used. The result
            is also assigned to `config.corda_factors`, so that `get_peft_model(model, config)` can
            follow.
        dataloader: Batches that represent the knowledge to keep (`kpm`) or the task (`ipm`), as a
            `DataLoader` or collator yields them: mappings of tensors, padded, packed or neither.
            Tokens where `attention_mask` is 0 do not count, and labels are ignored. A few hundred
            sequences are usual. Under several processes, each passes its own share.
        max_memory: Memory limit of the statistics at a time, in bytes or as `"500MB"`, `"4GiB"`. The
            default is an eighth of the size of the model's weights (a quarter where every pass has to
            run the full model again). If the statistics need more, the layers are calibrated in
            several passes over the data, with the same result. A pass starts at the block where the
            last one ended, if the model's blocks form a plain chain and the hidden states also fit;
            otherwise it starts at the first block. The data must be the same in every pass (an
            iterator is kept in memory for this).
        methods: Methods to find directions for: `"kpm"`, `"ipm"` or both. The default is the method
            of the config.
        checkpoint_dir: Folder for finished passes and, every `checkpoint_seconds`, partial sums. If
            called again with the same arguments, an interrupted calibration is resumed from there,
            with the same result. Several processes need the same folder.
        checkpoint_seconds: Minimum time in seconds between two snapshots of partial sums; 0 for one
            after each batch.
        dtype: Dtype in which sums are computed: `torch.float32` or, for twice the memory and time,
            `torch.float64`.
        progress: Whether to print the plan and show progress bars.
        verbose: Earlier name of `progress`.

    Returns:
        The factors on the CPU, the same on all processes.

    Raises:
        TypeError: If `config` is not a `CordaConfig`, or a batch is not a mapping.
        ValueError: If an argument is out of range; if no module matches, or one is unsupported or too
            small for its rank; if the data is empty, masked out, or gives NaN or infinite
            activations; if `max_memory` is too small for a single layer; if `checkpoint_dir` belongs
            to another calibration; or if the model is tensor-parallel or wrapped by FSDP1.
        RuntimeError: If another process failed, ended or did not respond in time.
    """
    chosen = _check_arguments(config, methods, dtype)
    given = bytes_of_limit(max_memory)
    sharding_of(model)  # before unwrapping, since it raises an error for FSDP1
    model = extract_model_from_parallel(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    processes = Processes(collective_forward=sharding_of(base) is not None)
    # Weights are gathered by the outermost module that was sharded.
    runs = model if processes.collective_forward else base
    targets = find_targets(base, config)
    with processes.error_barrier():
        # An iterator yields its batches once, but several passes may need them.
        batches = list(dataloader) if isinstance(dataloader, Iterator) else dataloader
        own = next(iter(batches), None)
    first = _first(own, processes)
    runner = Runner(runs, targets)
    with processes.error_barrier(running_model=True):
        layout = discover(runner, first)
    passing = runner if layout.masked else runner.cutting_padding()
    groups = layout.groups
    if chosen == ("ipm",) and config.corda_weighting == "covariance":
        groups = with_cross(groups, targets)
    with processes.error_barrier():
        plan = make_plan(runner, batches, first, groups, given, dtype.itemsize, processes)
    checkpoint = None
    if checkpoint_dir is not None:
        data = {
            "first batch of the data": digest_of(first),
            "number of batches": int(processes.add(torch.tensor(count_of(batches) or 0))),
        }
        about = identity(config, chosen, base, targets, plan.passes, dtype, data, processes)
        checkpoint = Checkpoint(checkpoint_dir, about, checkpoint_seconds, processes)
    options = PassOptions(
        progress=(progress if verbose is None else verbose) and processes.is_main,
        dtype=dtype,
        processes=processes,
        spare=_spare(runner, first) if processes.collective_forward else None,
    )
    if options.progress:
        print(plan, file=sys.stderr)
    found: dict[str, ModuleFactors] = {}
    for number in range(len(plan.passes)):
        part = checkpoint.finished(number) if checkpoint is not None else None
        if part is None:
            snapshots = checkpoint.snapshots(number) if checkpoint is not None else None
            label = f"Calibrating ({number + 1} of {len(plan.passes)})"
            now = replace(options, description=label, snapshots=snapshots)
            part = _run_pass(passing, batches, plan, number, now, config, chosen)
            if checkpoint is not None:
                checkpoint.finish(number, part)
        found.update(part.modules)
    factors = CordaFactors(
        modules={name: found[name] for name in targets},
        damping=config.corda_damping,
        weighting=config.corda_weighting,
    )
    config.corda_factors = factors
    return factors


def _run_pass(
    runner: Runner,
    batches: Iterable[Mapping[str, Any]],
    plan: Plan,
    number: int,
    options: PassOptions,
    config: CordaConfig,
    methods: Sequence[str],
) -> CordaFactors:
    """Factors of the modules of one pass."""
    groups = plan.passes[number]
    covariances = collect_covariances(runner, batches, groups, options, plan.carried(number))
    trim_memory()
    modules = factorise(
        groups, covariances, runner.targets, config, methods, options.processes, options.progress
    )
    trim_memory()
    return CordaFactors(modules, config.corda_damping, config.corda_weighting)


def _check_arguments(
    config: Any, methods: Sequence[str] | None, dtype: torch.dtype
) -> tuple[str, ...]:
    """Methods to find directions for, in the order of `METHODS`."""
    if not isinstance(config, CordaConfig):
        raise TypeError(f"config must be a peft_corda.CordaConfig, got {type(config).__name__}.")
    chosen = (config.method_for(),) if methods is None else tuple(methods)
    if not chosen or isinstance(methods, str) or any(name not in METHODS for name in chosen):
        raise ValueError(f"methods must be one or more of {METHODS}, got {methods!r}.")
    if config.corda_method not in (None, *chosen):
        raise ValueError(
            f"methods={methods!r} leaves out the config's own corda_method={config.corda_method!r}. "
            "Add it, or change the config."
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}.")
    return tuple(method for method in METHODS if method in chosen)


def _spare(runner: Runner, first: Mapping[str, Any]) -> Mapping[str, Any]:
    part = runner.parts(first)[0]
    return first_example(part) or part


def _first(batch: Mapping[str, Any] | None, processes: Processes) -> Mapping[str, Any]:
    """A batch that is the same on all processes, including those that have no data."""
    found = processes.first(None if batch is None else send_to_device(batch, "cpu"))
    if found is None:
        raise ValueError(
            "The calibration data is empty: the dataloader yielded no batch. Pass an iterable of "
            "batches; an iterator or generator can be used only once."
        )
    return found
