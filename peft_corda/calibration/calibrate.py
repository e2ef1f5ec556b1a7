"""`calibrate` and `initialize_corda`: from a model and data to factors, and into an adapter."""

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
    """Find the directions that the adapters of `config` are cut along (CorDA, Section 3).

    Args:
        model: the base model, or a `PeftModel` around it (which is run with its adapters as they
            are), also wrapped by `DistributedDataParallel`, sharded by `fully_shard` or DeepSpeed
            ZeRO-3, or offloaded by accelerate. Left as it was: weights, mode, hooks and gradients.
        config: its target modules, ranks, method, weighting and damping are used. The result is also
            put into `config.corda_factors`, so that `get_peft_model(model, config)` comes next.
        dataloader: batches that stand for the knowledge to keep (``kpm``) or for the task (``ipm``),
            as a `DataLoader` or collator yields them: mappings of tensors, padded, packed or not.
            Tokens where `attention_mask` is 0 do not count, labels are ignored. A few hundred
            sequences are usual. Under several processes each gives its own share.
        max_memory: what the statistics may take at a time, in bytes or as ``"500MB"``, ``"4GiB"``; by
            default an eighth of what the model's weights take (a quarter where every pass has to run the
            whole model again). Where they need more, the layers are
            done in several passes over the data; the result is the same. A pass starts at the block
            where the last one ended, if the model's blocks form a plain chain and the hidden states
            fit in as well; else from the start. The data must come in the same way every time (an
            iterator is kept in memory for it).
        methods: what to find directions for: ``"kpm"``, ``"ipm"`` or both; the config's own method by
            default.
        checkpoint_dir: folder to keep finished passes and, every `checkpoint_seconds`, partial sums
            in. Called again with the same arguments, an interrupted calibration goes on from there,
            to the same result. Several processes need the same folder.
        checkpoint_seconds: least time between two snapshots of partial sums; 0 for one after each
            batch.
        dtype: that sums are worked out in: `torch.float32` or, for twice the memory and time,
            `torch.float64`.
        progress: whether to print the plan and show progress bars.
        verbose: earlier name of `progress`.

    Returns:
        The factors, on the CPU; the same on all processes.

    Raises:
        TypeError: if `config` is not a `CordaConfig`, or a batch is not a mapping.
        ValueError: if an argument is out of range, no module matches, one is not supported or too
            small for its rank, the data is empty, masked out, or gives NaN or infinite activations,
            `max_memory` is too small for a single layer, or `checkpoint_dir` belongs to another
            calibration, or if the model is tensor-parallel or wrapped by FSDP1.
        RuntimeError: if another process failed, ended or did not come in time.
    """
    chosen = _check_arguments(config, methods, dtype)
    given = bytes_of_limit(max_memory)
    sharding_of(model)  # before wrappers are taken off: one of them cannot be calibrated under
    model = extract_model_from_parallel(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    processes = Processes(collective_forward=sharding_of(base) is not None)
    # Weights are gathered by the outermost module that was sharded.
    runs = model if processes.collective_forward else base
    targets = find_targets(base, config)
    with processes.error_barrier():
        # An iterator can be run through once, passes may need more.
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
    """The factors of the modules of one pass."""
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
    """The methods to find directions for."""
    if not isinstance(config, CordaConfig):
        raise TypeError(f"config must be a peft_corda.CordaConfig, got {type(config).__name__}.")
    chosen = (config.method_for(),) if methods is None else tuple(methods)
    if not chosen or isinstance(methods, str) or any(name not in METHODS for name in chosen):
        raise ValueError(f"methods must be some of {METHODS}, got {methods!r}.")
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
    """A batch that is the same on all processes, also on those that have no data themselves."""
    found = processes.first(None if batch is None else send_to_device(batch, "cpu"))
    if found is None:
        raise ValueError(
            "The calibration data is empty: the dataloader yielded no batch. Pass an iterable of "
            "batches; an iterator or generator can be used only once."
        )
    return found
