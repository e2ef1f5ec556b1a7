"""Plan of a calibration: its passes over the data and the memory that each needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil
from torch import nn

from kprune_ext.common.processes import Processes

from ..base_model.block_chain import Chain, find_chain
from ..base_model.forward import Runner
from ..base_model.hidden_state_cache import HiddenStateCache, Span
from ..base_model.input_groups import Group
from ..batches.batch_values import token_shape
from ..batches.batches import Batch, count_of, digest_of
from .passes import passes_within, plan_passes

# Smallest default limit, since saving memory is not worth it for smaller models.
_LEAST_DEFAULT = 64 * 2**20
# Size of hidden states that is not known, and the part of the host's memory that they may take.
_UNKNOWN = 2**62
_HOST_PART = 4
# Allowance for batches that are longer than the first one.
_MARGIN = 1.25


@dataclass(frozen=True)
class Plan:
    """Passes over the data.

    Attributes:
        passes: Groups of modules whose covariances are collected in each pass, in the order of the
            forward pass.
        spans: Blocks of each pass; None if hidden states are not carried from pass to pass.
        cache: Hidden-state cache that carries them; None if they are not carried.
        itemsize: Bytes per number of a covariance.
        hidden_bytes: Maximum bytes of the hidden states.
    """

    passes: list[list[Group]]
    spans: list[Span] | None
    cache: HiddenStateCache | None
    itemsize: int
    hidden_bytes: int

    def carried(self, number: int) -> tuple[HiddenStateCache, Span] | None:
        """Returns the hidden-state cache and the blocks of a pass; None if nothing is carried."""
        if self.cache is None or self.spans is None:
            return None
        return self.cache, self.spans[number]

    def __str__(self) -> str:
        sizes = [sum(group.bytes(self.itemsize) for group in groups) for groups in self.passes]
        modules = sum(len(group.members) for groups in self.passes for group in groups)
        text = (
            f"Calibrating {modules} modules: {sum(map(len, self.passes))} covariances of "
            f"{_megabytes(sum(sizes))} in {len(self.passes)} pass{'es' * (len(self.passes) > 1)}"
        )
        if len(self.passes) == 1:
            return text + "."
        text += f" of up to {_megabytes(max(sizes))}"
        if self.cache is None:
            return text + ", each from the start of the model."
        return (
            text
            + f", each from where the last one ended (hidden states: {_megabytes(self.hidden_bytes)})."
        )


def make_plan(
    runner: Runner,
    batches: Iterable[Batch],
    first: Batch,
    groups: Sequence[Group],
    limit: int | None,
    itemsize: int,
    processes: Processes,
    carries: bool = True,
) -> Plan:
    """Returns the fewest passes whose covariances and hidden states fit into `limit` bytes.

    Args:
        runner: Runner of the model and its target modules.
        batches: Batches of calibration data.
        first: First of the batches.
        groups: Groups in the order of the forward pass.
        limit: Memory limit in bytes; None for `default_memory`.
        itemsize: Bytes per number of a covariance.
        processes: Processes that take part; all get the same plan.
        carries: Whether hidden states may be carried from pass to pass.

    Raises:
        ValueError: If the covariance of a single group does not fit.
    """
    limits = default_memory(runner.model, groups, itemsize) if limit is None else (limit,)
    plain = Plan(plan_passes(groups, limits[-1], itemsize), None, None, itemsize, 0)
    if len(plan_passes(groups, limits[0], itemsize)) == 1:
        return plain
    example = runner.example(runner.parts(first)[0]) if carries else None
    found = None if example is None else find_chain(runner, example)
    hidden = None if found is None else _hidden_bytes(found.chain, batches, first)
    most = psutil.virtual_memory().total // _HOST_PART
    if hidden is not None and _is_in_host_memory(runner) and hidden > most:
        hidden = None
    # All processes must arrive at the same plan, whatever their shares of the data.
    needed = processes.largest(_UNKNOWN if hidden is None else hidden)
    counted = None if needed == _UNKNOWN else 0 if _is_in_host_memory(runner) else needed
    passes, carried = passes_within(groups, limits, itemsize, counted)
    if found is None or not carried:
        return plain
    spans = _spans(found.chain, groups, passes)
    if not all(found.holds_from(span.first) for span in spans if span.first > 0):
        return plain
    cache = HiddenStateCache(found.chain, needed, example or {})
    return Plan(passes, spans, cache, itemsize, needed)


def _is_in_host_memory(runner: Runner) -> bool:
    """Whether hidden states are kept elsewhere than on the device whose memory is limited."""
    return runner.device.type != "cpu"


def default_memory(model: nn.Module, groups: Sequence[Group], itemsize: int) -> tuple[int, int]:
    """Default memory limits: an eighth and a quarter of the size of the model's weights.

    Both are enough for any group of modules. The quarter is for models whose hidden states cannot be
    carried from pass to pass within an eighth, since each further pass would run the model again.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(group.bytes(itemsize) for group in groups)
    least = max(2 * largest, _LEAST_DEFAULT)
    return max(weights // 8, least), max(weights // 4, least)


def _spans(chain: Chain, groups: Sequence[Group], passes: Sequence[Sequence[Group]]) -> list[Span]:
    positions = iter(chain.positions(groups))
    blocks = [[next(positions) for _ in groups] for groups in passes]
    following = [blocks[number + 1][0] for number in range(len(blocks) - 1)] + [None]
    return [Span(own[0], own[-1], after) for own, after in zip(blocks, following, strict=True)]


def _hidden_bytes(chain: Chain, batches: Iterable[Batch], first: Batch) -> int | None:
    """Bytes of the hidden states of all batches; None if they are not known in advance."""
    if isinstance(batches, Sequence):
        shapes = [token_shape(batch) for batch in batches]
        if any(shape is None for shape in shapes):
            return None
        return chain.bytes_per_token * sum(shape[0] * shape[1] for shape in shapes if shape)
    shape, count = token_shape(first), count_of(batches)
    # A loader that shuffles yields other batches in every pass.
    if shape is None or count is None or not _comes_again(batches):
        return None
    return int(_MARGIN * chain.bytes_per_token * shape[0] * shape[1] * count)


def _comes_again(batches: Iterable[Batch]) -> bool:
    return len({digest_of(next(iter(batches), None)) for _ in range(2)}) == 1


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
