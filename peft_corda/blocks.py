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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .passes import Group
from .runner import Runner, digest_of, evaluating, moves_weights, token_shape, visiting


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
        example: a small batch. It is run in full and from every block that a pass may start at: what
            the targets from there on are given must be the same to the bit.
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
    seen = _run_and_watch(model, blocks, targets, runner, example)
    if not _is_chain(seen.calls, len(blocks)):
        return None
    hidden = seen.states[0]
    batch, length = token_shape(example) or (1, 1)
    chain = Chain(
        names=tuple(f"{name}.{number}" for number in range(len(blocks))),
        modules=tuple(blocks),
        in_tuple=isinstance(seen.calls[0].output, tuple),
        bytes_per_token=-(-hidden.numel() * hidden.element_size() // (batch * length)),
    )
    for start, block in enumerate(chain.names):
        if start > 0 and any(target.startswith(block + ".") for target in targets):
            try:
                with _handing_on(chain, start, partial(seen.states.__getitem__, start)):
                    again = _run_and_watch(model, blocks, targets, runner, example)
            except Exception:  # whatever a block misses that an earlier one leaves behind for it
                return None
            if not _same_from(start, seen, again):
                return None
    return chain


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
            self._keep(kept, _given(args, kwargs))
            if stops:
                runner.finish()

        with ExitStack() as stack:
            if self._start > 0:
                stack.enter_context(_handing_on(self._chain, self._start, self._state))
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


@dataclass
class _Call:
    block: int
    given: Tensor
    output: Any


@dataclass
class _Run:
    """What is seen of one run.

    Attributes:
        calls: of the blocks.
        states: copies of what each block was given.
        inputs: names and inputs of the targets that were called from each block on, until the next.
    """

    calls: list[_Call]
    states: list[Tensor]
    inputs: list[list[tuple[str, Tensor]]]


def _run_and_watch(
    model: nn.Module,
    blocks: nn.ModuleList,
    targets: Mapping[str, nn.Module],
    runner: Runner,
    example: dict[str, Any],
) -> _Run:
    run = _Run([], [], [[]])

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        run.states.append(_given(args, kwargs).clone())
        run.inputs.append([])

    def see(name: str, inputs: Tensor, *_: Any) -> None:
        run.inputs[-1].append((name, inputs.clone()))

    with evaluating(model), visiting(targets, see), ExitStack() as stack:
        for number, block in enumerate(blocks):

            def leave(
                _: nn.Module, args: Any, kwargs: Any, output: Any, number: int = number
            ) -> None:
                run.calls.append(_Call(number, _given(args, kwargs), output))

            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave, with_kwargs=True).remove)
        runner.run(example)
    return run


def _same_from(start: int, full: _Run, part: _Run) -> bool:
    """Whether the targets that are reached from this block on are given the same in both runs."""
    # Called before it as well, they belong to a pass that starts further in front.
    earlier = {name for inputs in full.inputs[: start + 1] for name, _ in inputs}
    expected, found = (
        [(name, given) for inputs in run.inputs for name, given in inputs if name not in earlier]
        for run in (full, part)
    )
    return [name for name, _ in expected] == [name for name, _ in found] and all(
        torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(expected, found, strict=True)
    )


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
