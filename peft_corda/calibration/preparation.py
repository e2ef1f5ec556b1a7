"""What a calibration starts from: checked arguments, target modules, a plan and a checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from peft import PeftModel
from torch import nn

from kprune_ext.common.memory import bytes_of_limit
from kprune_ext.common.placement import sharding_of
from kprune_ext.common.processes import Processes

from ..base_model.batches import Batch, count_of, digest_of, first_example
from ..base_model.forward import Runner
from ..base_model.input_groups import discover, with_cross
from ..base_model.targets import find_targets
from ..config import CordaConfig
from ..decomposition.directions import METHODS
from ..factors import CordaFactors
from .checkpoint import Checkpoint, identity
from .collect import PassOptions
from .plan import Plan, make_plan


@dataclass(frozen=True)
class Calibration:
    """A calibration that is ready to run.

    Attributes:
        runner: Runs batches through the model.
        batches: Calibration data of this process.
        plan: Passes over the data.
        methods: Methods to find directions for.
        options: How each pass is run.
        checkpoint: Folder that keeps finished passes, if any.
    """

    runner: Runner
    batches: Iterable[Batch]
    plan: Plan
    methods: tuple[str, ...]
    options: PassOptions
    checkpoint: Checkpoint | None

    @property
    def targets(self) -> Mapping[str, nn.Module]:
        """Target modules by name."""
        return self.runner.targets

    @property
    def processes(self) -> Processes:
        """Processes that take part."""
        return self.options.processes

    def pass_options(self, number: int) -> PassOptions:
        """How a pass is run, with its label and its snapshots."""
        snapshots = None if self.checkpoint is None else self.checkpoint.snapshots(number)
        label = f"Calibrating ({number + 1} of {len(self.plan.passes)})"
        return replace(self.options, description=label, snapshots=snapshots)

    def finished(self, number: int) -> CordaFactors | None:
        """Factors of a pass that an interrupted calibration has finished, if any."""
        return None if self.checkpoint is None else self.checkpoint.finished(number)

    def finish(self, number: int, factors: CordaFactors) -> None:
        """Keep the factors of a pass, where there is a checkpoint."""
        if self.checkpoint is not None:
            self.checkpoint.finish(number, factors)


def prepare(
    model: nn.Module,
    config: CordaConfig,
    dataloader: Iterable[Batch],
    max_memory: int | str | None,
    *,
    methods: Sequence[str] | None,
    checkpoint_dir: str | os.PathLike[str] | None,
    checkpoint_seconds: float,
    dtype: torch.dtype,
    progress: bool,
) -> Calibration:
    """Everything that a calibration starts from. The arguments and errors are those of `calibrate`."""
    chosen = _check_arguments(config, methods, dtype)
    limit = bytes_of_limit(max_memory)
    sharding_of(model)  # before unwrapping, since it raises an error for FSDP1
    model = extract_model_from_parallel(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    processes = Processes(collective_forward=sharding_of(base) is not None)
    targets = find_targets(base, config)
    with processes.error_barrier():
        # An iterator yields its batches once, but several passes may need them.
        batches = list(dataloader) if isinstance(dataloader, Iterator) else dataloader
        own = next(iter(batches), None)
    first = _first(own, processes)
    # Weights are gathered by the outermost module that was sharded.
    runner = Runner(model if processes.collective_forward else base, targets)
    with processes.error_barrier(running_model=True):
        layout = discover(runner, first)
    groups = layout.groups
    if chosen == ("ipm",) and config.corda_weighting == "covariance":
        groups = with_cross(groups, targets)
    with processes.error_barrier():
        plan = make_plan(runner, batches, first, groups, limit, dtype.itemsize, processes)
    checkpoint = None
    if checkpoint_dir is not None:
        data = {
            "first batch of the data": digest_of(first),
            "number of batches": int(processes.add(torch.tensor(count_of(batches) or 0))),
        }
        about = identity(config, chosen, base, targets, plan.passes, dtype, data, processes)
        checkpoint = Checkpoint(checkpoint_dir, about, checkpoint_seconds, processes)
    options = PassOptions(
        progress=progress and processes.is_main,
        dtype=dtype,
        processes=processes,
        spare=_spare(runner, first) if processes.collective_forward else None,
    )
    if options.progress:
        print(plan, file=sys.stderr)
    passing = runner if layout.masked else runner.cutting_padding()
    return Calibration(passing, batches, plan, chosen, options, checkpoint)


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
