"""Collection of covariances: from a model and batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kprune_ext.common.placement import is_offloaded
from kprune_ext.common.processes import Processes

from ..base_model.forward import Runner, evaluating, visiting
from ..base_model.hidden_state_cache import HiddenStateCache, Span
from ..base_model.input_groups import Group, InputSharing
from ..base_model.weights import full_bias
from ..batches.batches import Batch
from ..batches.masks import kept_rows
from ..checkpoint.checkpoint import Snapshots
from ..decomposition.covariance import (
    Covariance,
    CovarianceAccumulator,
    CrossAccumulator,
    CrossCovariance,
)
from .progress import Progress


@dataclass(frozen=True)
class PassOptions:
    """Options of one pass over the data.

    Attributes:
        progress: Progress bar of the calibration, which counts the batches; None for none.
        dtype: Dtype in which products and sums are computed.
        snapshots: Snapshots that partial sums are read from and written to; None for neither.
        processes: Processes, each of which feeds its own share of the data.
        spare: Batch that a process without any data left runs if the forward pass is collective. It
            does not count.
    """

    progress: Progress | None = None
    dtype: torch.dtype = torch.float32
    snapshots: Snapshots | None = None
    processes: Processes = field(default_factory=Processes)
    spare: Batch | None = None


def collect_covariances(
    runner: Runner,
    batches: Iterable[Batch],
    groups: Sequence[Group],
    options: PassOptions | None = None,
    cache: tuple[HiddenStateCache, Span] | None = None,
) -> dict[str, Covariance | CrossCovariance]:
    """Mean outer product of the inputs of each group, over the tokens that count.

    The model is run in evaluation mode without gradients, up to the last of the groups. It is left
    as it was, even after an error.

    Args:
        runner: Runner of the model and its target modules.
        batches: Mappings of tensors, as a collator yields them. Tokens where `attention_mask`
            (`(batch, tokens)`) is 0 are left out.
        groups: Groups from `input_groups.discover`; the covariance of a group is collected once.
        options: Options of the pass; None for the defaults.
        cache: Hidden-state cache and the blocks of this pass, if hidden states are carried from pass
            to pass.

    Returns:
        Covariances by the name of the group's first module (cross-covariances of outputs and inputs
        for groups that have `outputs`), the same on all processes.

    Raises:
        TypeError: If a batch is not a mapping.
        ValueError: If the data has no batch or no token that counts, if an input is not finite (the
            first such module is named), if the mask cannot be broadcast to the shape of an input, or
            if the modules of a group get different inputs after all.
    """
    options = options or PassOptions()
    runner.stop_after = _stopping_point(runner.model, groups)
    watched = {name: runner.targets[name] for group in groups for name in group.members}
    with_output = {group.leader for group in groups if group.outputs is not None}
    sums = _Sums(groups, watched, runner, options)
    with options.processes.error_barrier(running_model=True):
        carried: AbstractContextManager[None] = nullcontext()
        if cache is not None:
            span = cache[1]
            carried = cache[0].running(span.first, span.last, span.following, runner)
        with evaluating(runner.model), carried, visiting(watched, sums.visit, with_output):
            done = sums.restore(options.snapshots)
            if done and cache is not None:
                # Skipped batches leave no hidden states in the cache.
                cache[0].give_up()
            parts = _parts(batches, done, runner, sums, options, cache)
            for part in options.processes.items(parts):
                sums.begin(counts=part is not None)
                runner.run(part if part is not None else dict(options.spare or {}))
    return sums.finish()


def _parts(
    batches: Iterable[Batch],
    done: int,
    runner: Runner,
    sums: _Sums,
    options: PassOptions,
    cache: tuple[HiddenStateCache, Span] | None,
) -> Iterator[dict[str, Any]]:
    """Yields the parts to run from batch number `done` on; checks and saves sums between batches."""
    snapshots = options.snapshots
    progress = options.progress
    for number, batch in enumerate(progress.over(batches, done) if progress else batches):
        if snapshots is not None:
            snapshots.saw(batch)
        if number < done:
            continue
        for part in runner.parts(batch, number):
            if cache is not None:
                cache[0].next_part(part)
            yield part
        sums.check_finite()
        if snapshots is not None:
            snapshots.maybe_write(number + 1, sums.accumulators)
    if snapshots is not None:
        snapshots.saw_all()


class _Sums:
    """Accumulators of a pass, updated by the modules' hooks."""

    def __init__(
        self,
        groups: Sequence[Group],
        modules: Mapping[str, nn.Module],
        runner: Runner,
        options: PassOptions,
    ) -> None:
        self.accumulators: dict[str, CovarianceAccumulator] = {}
        self._groups = groups
        self._modules = modules
        self._by_leader = {group.leader: group for group in groups}
        self._leader_of = {name: group.leader for group in groups for name in group.members}
        self._runner = runner
        self._options = options
        self._sharing = InputSharing()
        self._seen: dict[str, int] = {}
        self._counts = True

    def visit(self, name: str, inputs: Tensor, output: Tensor | None = None) -> None:
        if not self._counts:
            return
        number, leader = self._sharing.number_of(inputs), self._leader_of[name]
        if name == leader:
            self._seen[name] = number
        elif self._seen.get(leader) != number:
            raise ValueError(
                f"{name} had the same input as {leader} in one batch but not in another, so their "
                "statistics cannot be shared. Calibrate them separately, with one calibrate() call "
                "and its own target_modules for each."
            )
        if name == leader:
            accumulator = self._accumulator(name, inputs.device)
            mask = self._runner.mask_for(inputs)
            rows = kept_rows(name, inputs, mask)
            if isinstance(accumulator, CrossAccumulator):
                assert output is not None  # visited after their forward
                given = kept_rows(name, output, mask)
                bias = full_bias(self._modules[name])
                if bias is not None:
                    given = given.float() - bias.float()
                accumulator.update_pair(rows, given)
            else:
                accumulator.update(rows)
        self._runner.visited(name)

    def begin(self, counts: bool) -> None:
        """Prepare for one run of the model.

        Args:
            counts: Whether the inputs of the run are added to the sums.
        """
        self._sharing.forget()
        self._counts = counts

    def restore(self, snapshots: Snapshots | None) -> int:
        """Restore partial sums, if any; returns the number of batches that they cover."""
        if snapshots is None:
            return 0
        batches, sums = snapshots.read()
        for group in self._groups:
            if group.leader in sums:
                matrix, tokens = sums[group.leader]
                accumulator = self._accumulator(group.leader, self._runner.device)
                accumulator.restore(matrix, tokens)
        return batches

    def check_finite(self) -> None:
        # In the order of the forward pass, so that the first faulty module is named.
        for name, accumulator in self.accumulators.items():
            if not torch.isfinite(accumulator.energy()):
                raise ValueError(
                    f"The input of {name} has NaN or infinite values. Check the calibration data and "
                    "the model in this dtype; float16 overflows easily, try bfloat16 or float32."
                )

    def finish(self) -> dict[str, Covariance | CrossCovariance]:
        found: dict[str, Covariance | CrossCovariance] = {}
        for group in self._groups:
            name = group.leader
            # A process without data has no accumulator yet.
            accumulator = self._accumulator(name, self._runner.device)
            accumulator.reduce(self._options.processes.add)
            if accumulator.tokens == 0:
                raise ValueError(
                    f"The calibration data has no token that counts for {name}: every batch was empty "
                    "or masked out by attention_mask. Check the tokenizer's padding and the mask."
                )
            found[name] = accumulator.finish()
            del self.accumulators[name]
        return found

    def _accumulator(self, name: str, device: torch.device) -> CovarianceAccumulator:
        if name not in self.accumulators:
            group, dtype = self._by_leader[name], self._options.dtype
            if group.outputs is None:
                new = CovarianceAccumulator(group.features, device, dtype)
            else:
                new = CrossAccumulator(
                    group.features,
                    group.outputs,
                    device,
                    dtype,
                    probes=group.probes,
                    stream=self._options.processes.rank,
                )
            self.accumulators[name] = new
        return self.accumulators[name]


def _stopping_point(model: nn.Module, groups: Sequence[Group]) -> str | None:
    """Name of the module after which nothing is left to collect, if that is certain."""
    if not all(group.called_once for group in groups) or is_offloaded(model):
        return None
    return groups[-1].members[-1]
