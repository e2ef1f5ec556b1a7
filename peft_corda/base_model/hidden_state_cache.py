"""Passes over a part of a model's blocks, without running the blocks before them again.

A pass keeps the hidden states that go into the first block of the next pass, and that pass starts
there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import digest_of
from .block_chain import Chain, given_to, resumed_from_block
from .forward import Runner


class HiddenStateCache:
    """Carries hidden states from one pass to the next.

    Args:
        chain: the model's blocks.
        limit: bytes that the hidden states may take; they are given up, and later passes run from
            the start, if they need more.
    """

    def __init__(self, chain: Chain, limit: int) -> None:
        self._chain = chain
        self._limit = limit
        self._start = 0
        self._states: list[Tensor] = []
        self._digests: list[str] = []
        self._part = -1
        self._size = 0
        self._keeps = False

    @contextmanager
    def running(
        self, first: int, last: int, following: int | None, runner: Runner
    ) -> Iterator[None]:
        """One pass.

        Args:
            first, last: blocks of the first and the last group of the pass.
            following: block of the first group of the next pass; None in the last pass.
            runner: what the pass is run with.

        Raises:
            ValueError: if the data is not that of the pass before.
        """
        if self._start > first:
            self._forget()
        if self._start == 0:
            self._digests = []
        self._part = -1
        self._size = 0
        kept: list[Tensor] = []
        self._keeps = following is not None and following > self._start
        # Where it is not certain that the groups are done with, the model runs to its end.
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
        """Keep nothing in this pass: the next one starts from the beginning."""
        self._keeps = False

    def _keep(self, kept: list[Tensor], hidden: Tensor) -> None:
        self._size += hidden.numel() * hidden.element_size()
        if self._size > self._limit:
            self._keeps = False
            kept.clear()
        if self._keeps:
            kept.append(hidden.detach().clone())

    def _state(self) -> Tensor:
        state = self._states[self._part]
        if self._keeps:
            # The next pass starts further on.
            self._states[self._part] = torch.empty(0)
        return state

    def next_part(self, part: Mapping[str, Any]) -> None:
        """To be called before each part of a batch is run.

        Raises:
            ValueError: if its hidden states are those of other data.
        """
        self._part += 1
        digest = digest_of(part)
        if self._start == 0:
            self._digests.append(digest)
        elif digest not in self._digests[self._part : self._part + 1]:
            self._refuse()

    def _refuse(self) -> None:
        raise ValueError(
            "The calibration data came in another order, or otherwise, than in the pass before. Give "
            "the same batches every time (no shuffling), or a list of them, or a max_memory that is "
            "enough for one pass."
        )

    def _forget(self) -> None:
        self._start, self._states = 0, []


@dataclass(frozen=True)
class Span:
    """Blocks of a pass: of its first and last group, and of the first group of the next pass."""

    first: int
    last: int
    following: int | None
