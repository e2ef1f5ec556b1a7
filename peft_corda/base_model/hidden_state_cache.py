"""Cache of hidden states, so that a pass need not rerun the blocks of earlier passes.

A pass caches the hidden states that enter the first block of the next pass, and the next pass starts
at that block. They are kept in host memory, whatever device the model is on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batches.batches import digest_of
from .block_chain import Chain, given_to, resumed_from_block
from .forward import Runner


class HiddenStateCache:
    """Caches hidden states from one pass to the next.

    Args:
        chain: The model's blocks.
        limit: Maximum size of the hidden states in bytes. If they need more, they are discarded, and
            later passes run from the first block.
        example: The batch that the chain was found with. Other entries, such as images that the first
            batch does not have, may make blocks depend on more than the previous one; then hidden
            states are discarded, too.
    """

    def __init__(self, chain: Chain, limit: int, example: Mapping[str, Any]) -> None:
        self._chain = chain
        self._limit = limit
        self._entries = _entries(example)
        self._start = 0
        self._states: dict[int, Tensor] = {}  # by number of the part
        self._digests: list[str] = []
        self._part = -1
        self._size = 0
        self._keeps = False

    @contextmanager
    def running(
        self, first: int, last: int, following: int | None, runner: Runner
    ) -> Iterator[None]:
        """Context of one pass.

        Args:
            first: Block of the first group of the pass.
            last: Block of the last group of the pass.
            following: Block of the first group of the next pass, or None in the last pass.
            runner: Runner of the pass.

        Raises:
            ValueError: If the data is not that of the previous pass.
        """
        if self._start > first:
            self._forget()
        if self._start == 0:
            self._digests = []
        self._part = -1
        self._size = 0
        kept: dict[int, Tensor] = {}
        self._keeps = following is not None and following > self._start
        # If later blocks may still reach the groups of this pass, the model runs to its end.
        stops = following is not None and last < following and runner.stop_after is not None

        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._keep(kept, given_to(args, kwargs))
            if stops:
                runner.finish()

        with ExitStack() as stack:
            if self._start > 0:
                stack.enter_context(resumed_from_block(self._chain, self._start, self._state))
            if self._keeps and following is not None:
                block = self._chain.modules[following]
                stack.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
                if stops:
                    runner.stop_after = None
            yield
            if self._start > 0 and self._part + 1 < len(self._digests):
                self._refuse()
        if self._keeps and following is not None:
            self._start, self._states = following, kept
        elif following != self._start:
            self._forget()

    def give_up(self) -> None:
        """Caches nothing in this pass, so that the next one starts from the first block."""
        self._keeps = False

    def _keep(self, kept: dict[int, Tensor], hidden: Tensor) -> None:
        self._size += hidden.numel() * hidden.element_size()
        if self._size > self._limit or self._part in kept:  # or called again in the same run
            self._keeps = False
            kept.clear()
        if self._keeps:
            kept[self._part] = _in_host_memory(hidden.detach())

    def _state(self) -> Tensor:
        state = self._states[self._part]
        if self._keeps:
            # The next pass starts at a later block.
            self._states[self._part] = torch.empty(0)
        return state

    def next_part(self, part: Mapping[str, Any]) -> None:
        """Moves on to the next part of a batch; must be called before the part is run.

        Raises:
            ValueError: If the cached hidden states belong to other data.
        """
        self._part += 1
        if _entries(part) != self._entries:
            self._keeps = False
        digest = digest_of(part)
        if self._start == 0:
            self._digests.append(digest)
        elif digest not in self._digests[self._part : self._part + 1]:
            self._refuse()

    def _refuse(self) -> None:
        raise ValueError(
            "The calibration data, or its order, differs from that of the previous pass. Give the same "
            "batches in every pass (without shuffling), for example as a list, or a max_memory that "
            "is enough for a single pass."
        )

    def _forget(self) -> None:
        self._start, self._states = 0, {}


def _in_host_memory(hidden: Tensor) -> Tensor:
    """Returns a copy in host memory, which an accelerator copies to while it goes on computing."""
    if hidden.device.type != "cuda":
        return hidden.to("cpu", copy=True)
    try:
        copy = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
    except RuntimeError:  # the system does not let so much memory be pinned
        return hidden.cpu()
    # What reads the copy runs in the same stream, after it.
    return copy.copy_(hidden, non_blocking=True)


def _entries(part: Mapping[str, Any]) -> set[str]:
    return set(part) - {"attention_mask", "decoder_attention_mask", "labels"}


@dataclass(frozen=True)
class Span:
    """Blocks of the first and the last group of a pass, and of the first group of the next pass."""

    first: int
    last: int
    following: int | None
