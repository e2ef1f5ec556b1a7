"""Passes over a part of a model's blocks, without running the blocks before them again.

A transformer is a list of blocks, each given what the one before put out. Where that is so, a pass
keeps the hidden states that go into the first block of the next pass, and that pass starts there. The
model's own forward runs all the same, so masks and positions are what they always are; only blocks
that are done with hand their input on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .passes import Group
from .runner import Runner, evaluating, moves_weights


@dataclass(frozen=True)
class Chain:
    """Blocks that are called one after the other, each with the hidden states of the one before.

    Attributes:
        names: as in `model.named_modules()`.
        modules: the blocks.
        in_tuple: whether a block puts its hidden states out in a tuple of one.
        bytes_per_token: of the hidden states.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    in_tuple: bool
    bytes_per_token: int

    def positions(self, groups: Sequence[Group]) -> list[int]:
        """The block from which on the model must run to reach each group.

        Args:
            groups: in the order of the forward pass; those behind the blocks are reached from the
                last block.
        """
        positions: list[int] = []
        for group in groups:
            inside = [n for n, name in enumerate(self.names) if group.leader.startswith(name + ".")]
            before = positions[-1] if positions else 0
            positions.append(inside[0] if inside else before)
        return positions


def find_chain(
    model: nn.Module, targets: Mapping[str, nn.Module], example: dict[str, Any]
) -> Chain | None:
    """The chain of blocks that holds the targets, checked by running it; None if there is none.

    Args:
        model, targets: as for `collect.collect_covariances`.
        example: a small batch. It is run in full and from the middle: the last block's hidden states
            must be the same to the bit.
    """
    if moves_weights(model):
        return None
    lists = [
        (sum(target.startswith(name + ".") for target in targets), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    held, name, blocks = max(lists, key=lambda entry: entry[0], default=(0, "", nn.ModuleList()))
    if held == 0:
        return None
    runner = Runner(model, targets)
    seen = _run_and_watch(model, blocks, runner, example)
    if not _is_chain(seen, len(blocks)):
        return None
    hidden = _hidden(seen[0].output)
    assert hidden is not None  # follows from the check above
    chain = Chain(
        names=tuple(f"{name}.{number}" for number in range(len(blocks))),
        modules=tuple(blocks),
        in_tuple=isinstance(seen[0].output, tuple),
        bytes_per_token=hidden.shape[-1] * hidden.element_size(),
    )
    middle = len(blocks) // 2
    with _handing_on(chain, middle, lambda: seen[middle].given):
        again = _run_and_watch(model, blocks, runner, example)
    first, second = _hidden(seen[-1].output), _hidden(again[-1].output)
    same = first is not None and second is not None and torch.equal(first, second)
    return chain if same else None


class Relay:
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
        """
        if self._start > first:
            self._forget()
        self._part = -1
        self._size = 0
        kept: list[Tensor] = []
        self._keeps = following is not None and following > self._start

        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._keep(kept, _given(args, kwargs))
            if following is not None and last < following:
                runner.finish()

        with ExitStack() as stack:
            if self._start > 0:
                stack.enter_context(_handing_on(self._chain, self._start, self._state))
            if self._keeps and following is not None:
                block = self._chain.modules[following]
                stack.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
                if last < following:
                    runner.stop_after = None
            yield
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

    def next_part(self) -> None:
        """To be called before each part of a batch is run."""
        self._part += 1

    def _forget(self) -> None:
        self._start, self._states = 0, []


@dataclass
class _Call:
    block: int
    given: Tensor
    output: Any


def _run_and_watch(
    model: nn.Module, blocks: nn.ModuleList, runner: Runner, example: dict[str, Any]
) -> list[_Call]:
    calls: list[_Call] = []
    with evaluating(model), ExitStack() as stack:
        for number, block in enumerate(blocks):

            def watch(
                _: nn.Module, args: Any, kwargs: Any, output: Any, number: int = number
            ) -> None:
                calls.append(_Call(number, _given(args, kwargs), output))

            stack.callback(block.register_forward_hook(watch, with_kwargs=True).remove)
        runner.run(example)
    return calls


def _is_chain(calls: Sequence[_Call], length: int) -> bool:
    if [call.block for call in calls] != list(range(length)):
        return False
    if len({type(call.output) for call in calls}) != 1:
        return False
    outputs = [_hidden(call.output) for call in calls]
    return all(output is not None for output in outputs) and all(
        after.given is before for before, after in zip(outputs, calls[1:], strict=False)
    )


def _given(args: Any, kwargs: Any) -> Tensor:
    given = args[0] if args else next(iter(kwargs.values()))
    return given if isinstance(given, Tensor) else torch.empty(0)


def _hidden(output: Any) -> Tensor | None:
    """The hidden states in what a block puts out, if nothing else is in it."""
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    return output if isinstance(output, Tensor) else None


@contextmanager
def _handing_on(chain: Chain, start: int, states: Callable[[], Tensor]) -> Iterator[None]:
    """Blocks before `start` do nothing; the last of them puts out `states()`."""

    def form(hidden: Tensor) -> Any:
        return (hidden,) if chain.in_tuple else hidden

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        return form(_given(args, kwargs))

    def put_out(*args: Any, **kwargs: Any) -> Any:
        # A copy: models may change hidden states in place.
        return form(states().clone())

    with ExitStack() as stack:
        for number, module in enumerate(chain.modules[:start]):
            own = module.__dict__.get("forward")
            stack.callback(_restore_forward, module, own)
            module.__dict__["forward"] = put_out if number == start - 1 else pass_on
        yield


def _restore_forward(module: nn.Module, own: Any) -> None:
    del module.__dict__["forward"]
    if own is not None:
        module.__dict__["forward"] = own
