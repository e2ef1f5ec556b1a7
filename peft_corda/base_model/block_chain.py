"""Whether a model's blocks form a chain, and how such a model is run from its middle.

A transformer is a list of blocks, each given what the one before put out. Where that is so, blocks at
the front can be left out: the model's own forward runs all the same, so masks and positions are what
they always are, but these blocks hand their input on, and the last of them puts out hidden states
that were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kprune_ext.common.placement import is_offloaded

from .batches import token_shape
from .forward import Runner, evaluating, visiting
from .input_groups import Group


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


@dataclass(frozen=True)
class Candidate:
    """A chain of blocks by its looks.

    Attributes:
        chain: the blocks.
        holds_from: whether an example, run from a block on, gives the targets from there on the same
            inputs to the bit as when run in full.
    """

    chain: Chain
    holds_from: Callable[[int], bool]


def find_chain(runner: Runner, example: dict[str, Any]) -> Candidate | None:
    """The chain of blocks that holds the targets; None if there is none.

    Args:
        runner: of the model and its target modules.
        example: a small batch, which is run.
    """
    model, targets = runner.model, runner.targets
    if is_offloaded(model):
        return None
    lists = [
        (sum(target.startswith(name + ".") for target in targets), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    held, name, blocks = max(lists, key=lambda entry: entry[0], default=(0, "", nn.ModuleList()))
    if held == 0:
        return None
    seen = _run_and_watch(runner, blocks, example)
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

    def holds_from(start: int) -> bool:
        try:
            with resumed_from_block(chain, start, partial(seen.states.__getitem__, start)):
                again = _run_and_watch(runner, blocks, example)
        except Exception:  # whatever a block misses that an earlier one leaves behind for it
            return False
        return _same_from(start, seen, again)

    return Candidate(chain, holds_from)


def given_to(args: Any, kwargs: Any) -> Tensor:
    """The hidden states that a block is called with: its first argument."""
    given = args[0] if args else next(iter(kwargs.values()))
    return given if isinstance(given, Tensor) else torch.empty(0)


@contextmanager
def resumed_from_block(chain: Chain, start: int, states: Callable[[], Tensor]) -> Iterator[None]:
    """Blocks before `start` do nothing; the last of them puts out `states()`."""

    def form(hidden: Tensor) -> Any:
        return (hidden,) if chain.in_tuple else hidden

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        return form(given_to(args, kwargs))

    def resume(*args: Any, **kwargs: Any) -> Any:
        # A copy: models may change hidden states in place.
        return form(states().clone())

    with ExitStack() as stack:
        for number, module in enumerate(chain.modules[:start]):
            own = module.__dict__.get("forward")
            stack.callback(_restore_forward, module, own)
            module.__dict__["forward"] = resume if number == start - 1 else pass_on
        yield


def _restore_forward(module: nn.Module, own: Any) -> None:
    del module.__dict__["forward"]
    if own is not None:
        module.__dict__["forward"] = own


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


def _run_and_watch(runner: Runner, blocks: nn.ModuleList, example: dict[str, Any]) -> _Run:
    run = _Run([], [], [[]])

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        run.states.append(given_to(args, kwargs).clone())
        run.inputs.append([])

    def see(name: str, inputs: Tensor, *_: Any) -> None:
        run.inputs[-1].append((name, inputs.clone()))

    with evaluating(runner.model), visiting(runner.targets, see), ExitStack() as stack:
        for number, block in enumerate(blocks):

            def leave(
                _: nn.Module, args: Any, kwargs: Any, output: Any, number: int = number
            ) -> None:
                run.calls.append(_Call(number, given_to(args, kwargs), output))

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


def _hidden(output: Any) -> Tensor | None:
    """The hidden states in what a block puts out, if nothing else is in it."""
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    return output if isinstance(output, Tensor) else None
