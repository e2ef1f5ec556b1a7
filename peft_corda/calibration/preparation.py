"""What a calibration starts from: checked arguments, target modules, a plan and a checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn

from kprune_ext.common.memory import bytes_of_limit
from kprune_ext.common.placement import sharding_of
from kprune_ext.common.processes import Processes

from ..base_model.forward import Runner
from ..base_model.input_groups import with_cross
from ..base_model.targets import find_targets
from ..batches.batches import Batch, count_of, digest_of
from ..batches.from_data import calibration_batches
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.identity import full_digest_of, identity, leaders_of, settings_of
from ..config import CordaConfig, rank_of
from ..decomposition.directions import ALL_METHODS, METHODS
from ..factors import CordaFactors
from ..planning.first_batches import look_at
from ..planning.plan import Plan, make_plan
from .collect import PassOptions
from .progress import shown_progress


@dataclass(frozen=True)
class Calibration:
    """A calibration that is ready to run.

    Attributes:
        runner: Runs batches through the model.
        batches: Calibration data of this process.
        keep: Data of this process to keep, beside those of the task; None for most methods.
        shows: Whether to show a progress bar.
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
    keep: Iterable[Batch] | None = None
    shows: bool = False

    @property
    def targets(self) -> Mapping[str, nn.Module]:
        """Target modules by name."""
        return self.runner.targets

    @property
    def processes(self) -> Processes:
        """Processes that take part."""
        return self.options.processes

    def pass_options(self, number: int) -> PassOptions:
        """How a pass is run, with its snapshots."""
        snapshots = None if self.checkpoint is None else self.checkpoint.snapshots(number)
        return replace(self.options, snapshots=snapshots)

    @contextmanager
    def shown(self) -> Iterator[Calibration]:
        """Shows one progress bar for all passes, in the block, if one is wanted."""
        counts = [count_of(data) for data in (self.batches, self.keep) if data is not None]
        known = [count for count in counts if count is not None]
        batches = sum(known) if len(known) == len(counts) else None
        groups = [len(groups) for groups in self.plan.passes]
        with shown_progress(self.shows, batches, groups) as bar:
            yield replace(self, options=replace(self.options, progress=bar))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps others out of the checkpoint, and leaves them a note of an error, in the block."""
        with self.processes.leaving_a_note():
            if self.checkpoint is None:
                yield
            else:
                with self.checkpoint.held():
                    yield

    def finished(self, number: int, config: CordaConfig) -> CordaFactors | None:
        """Factors of a pass that an interrupted calibration has finished, if any."""
        if self.checkpoint is None:
            return None
        names = [name for group in self.plan.passes[number] for name in group.members]
        return self.checkpoint.finished(number, {name: rank_of(config, name) for name in names})

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
    keep: Iterable[Batch] | None = None,
    methods: Sequence[str] | None,
    checkpoint_dir: str | os.PathLike[str] | None,
    checkpoint_seconds: float,
    dtype: torch.dtype,
    tokenizer: Any,
    max_length: int | None,
    progress: bool,
) -> Calibration:
    """Everything that a calibration starts from. The arguments and errors are those of `calibrate`."""
    with Processes().error_barrier():
        chosen = check_arguments(config, methods, dtype, keep is not None)
        limit = bytes_of_limit(max_memory)
        model, base, targets, sharding = found_targets(model, config)
    processes = Processes(collective_forward=sharding is not None)
    if processes.count > 1:
        resumes = checkpoint_dir is not None
        processes.require_agreement(
            settings_of(config, chosen, base, targets, dtype, limit, resumes, sharding)
        )
    with processes.error_barrier():
        batches = calibration_batches(base, dataloader, tokenizer, max_length)
        if keep is not None:
            keep = calibration_batches(base, keep, tokenizer, max_length)
    # Weights are gathered by the outermost module that was sharded.
    runner = Runner(model if processes.collective_forward else base, targets)
    first, layout = look_at(runner, batches, processes)
    groups = layout.groups
    if chosen == ("ipm",) and config.corda_weighting == "covariance":
        groups = with_cross(groups, targets, config.corda_sketch)
    with processes.error_barrier():
        # Where the first batch leaves out a target, it does not show what its blocks depend on.
        size, one = dtype.itemsize * (1 if keep is None else 2), layout.at_once
        plan = make_plan(runner, batches, first, groups, limit, size, processes, carries=one)
    processes.require_agreement({"layers of the passes": leaders_of(plan.passes)})
    checkpoint = None
    if checkpoint_dir is not None:
        data = {
            "first batch of the data": digest_of(first),
            "number of batches": int(processes.add(torch.tensor(count_of(batches) or 0))),
        }
        if keep is not None:
            data["first batch of keep"] = digest_of(next(iter(keep), None))
            data["number of batches of keep"] = int(
                processes.add(torch.tensor(count_of(keep) or 0))
            )
        with processes.error_barrier(running_model=True):  # sharded weights are gathered
            about = identity(config, chosen, base, targets, plan.passes, dtype, data, processes)
            seen = _digests(batches)
            checkpoint = Checkpoint(checkpoint_dir, about, checkpoint_seconds, processes, seen)
    options = PassOptions(
        dtype=dtype,
        processes=processes,
        spare=_spare(runner, first) if processes.collective_forward else None,
    )
    shows = progress and processes.is_main
    if shows:
        print(plan, file=sys.stderr)
    passing = runner if layout.masked else runner.cutting_padding()
    return Calibration(passing, batches, plan, chosen, options, checkpoint, keep, shows)


def found_targets(
    model: nn.Module, config: CordaConfig
) -> tuple[nn.Module, nn.Module, dict[str, nn.Module], str | None]:
    """Returns the model without wrappers, the base model in it, its targets, and how it is sharded.

    The errors are those of `calibrate`.
    """
    sharding_of(model)  # before unwrapping, since it raises an error for FSDP1
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return model, base, find_targets(base, config), sharding_of(base)


def check_arguments(
    config: Any, methods: Sequence[str] | None, dtype: torch.dtype, has_keep: bool
) -> tuple[str, ...]:
    """Methods to find directions for, in the order of `ALL_METHODS`; errors as of `calibrate`."""
    if not isinstance(config, CordaConfig):
        raise TypeError(f"config must be a peft_corda.CordaConfig, got {type(config).__name__}.")
    chosen = (config.method_for(),) if methods is None else tuple(methods)
    if not chosen or isinstance(methods, str) or any(name not in ALL_METHODS for name in chosen):
        raise ValueError(f"methods must be one or more of {ALL_METHODS}, got {methods!r}.")
    if len(set(chosen)) > 1 and not set(chosen) <= set(METHODS):
        raise ValueError(
            f"Only {' and '.join(map(repr, METHODS))} may be found together, got methods={methods!r}. "
            "Calibrate once for each of the others."
        )
    if ("sc_lora" in chosen) != has_keep:
        wanted = "needs" if "sc_lora" in chosen else "is only for corda_method='sc_lora', which has"
        raise ValueError(
            f"calibrate(model, config, task, keep=...) {wanted} batches of the knowledge to keep beside "
            f"those of the task; methods are {chosen!r}, and keep is "
            f"{'given' if has_keep else 'missing'}."
        )
    if config.corda_method not in (None, *chosen):
        raise ValueError(
            f"methods={methods!r} leaves out the config's own corda_method={config.corda_method!r}. "
            "Add it, or change the config."
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}.")
    return tuple(method for method in ALL_METHODS if method in chosen)


def _digests(batches: Iterable[Batch]) -> list[str] | None:
    """Digests of the batches, if they are all there: to look at a loader's once more has effects."""
    if not isinstance(batches, list | tuple):
        return None
    return [full_digest_of(batches[number]) for number in range(len(batches))]


def _spare(runner: Runner, first: Mapping[str, Any]) -> Mapping[str, Any]:
    part = runner.parts(first)[0]
    return runner.example(part) or part
