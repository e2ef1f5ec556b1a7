"""Detects whether a model's blocks form a chain, and runs such a model from a block in the middle.

A transformer is a list of blocks, each called with the output of the previous one. In such a chain,
the first blocks can be skipped: the model's own forward still runs, so masks and positions are
unchanged, but these blocks pass their input on, and the last of them returns cached hidden states.
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

from ..batches.batch_values import token_shape
from .forward import Runner, evaluating, visiting
from .input_groups import Group


@dataclass(frozen=True)
class Chain:
    """Blocks that are called in sequence, each with the hidden states of the previous one.

    Attributes:
        names: Names of the blocks, as in `model.named_modules()`.
        modules: The blocks.
        in_tuple: Whether a block returns its hidden states in a tuple of one.
        bytes_per_token: Size of the hidden states, in bytes per token.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    in_tuple: bool
    bytes_per_token: int

    def positions(self, groups: Sequence[Group]) -> list[int]:
        """Returns the first block that the model must run to reach each group.

        Args:
            groups: Groups in the order of the forward pass. A group outside the blocks is reached
                from the same block as the group before it.
        """
        positions: list[int] = []
        for group in groups:
            inside = [n for n, name in enumerate(self.names) if group.leader.startswith(name + ".")]
            before = positions[-1] if positions else 0
            positions.append(inside[0] if inside else before)
        return positions


@dataclass(frozen=True)
class Candidate:
    """An apparent chain of blocks, not yet verified.

    Attributes:
        chain: The blocks.
        holds_from: Whether an example, run from a given block, gives the targets from that block on
            bitwise the same inputs as a full run.
    """

    chain: Chain
    holds_from: Callable[[int], bool]


def find_chain(runner: Runner, example: dict[str, Any]) -> Candidate | None:
    """Returns the chain of blocks that contains the targets, or None if the model has no chain.

    Args:
        runner: Runner of the model and its target modules.
        example: A small batch, which is run.
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
        except Exception:  # a block may miss state that an earlier block sets for it
            return False
        return _same_from(start, seen, again)

    return Candidate(chain, holds_from)


def given_to(args: Any, kwargs: Any) -> Tensor:
    """Returns the hidden states that a block is called with, its first argument."""
    given = args[0] if args else next(iter(kwargs.values()))
    return given if isinstance(given, Tensor) else torch.empty(0)


@contextmanager
def resumed_from_block(chain: Chain, start: int, states: Callable[[], Tensor]) -> Iterator[None]:
    """Makes blocks before `start` pass their input on, and the last of them return `states()`."""

    def form(hidden: Tensor) -> Any:
        return (hidden,) if chain.in_tuple else hidden

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        return form(given_to(args, kwargs))

    def resume(*args: Any, **kwargs: Any) -> Any:
        # A copy, as models may change hidden states in place.
        device = given_to(args, kwargs).device
        return form(states().to(device, non_blocking=True, copy=True))

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
    """Record of one run.

    Attributes:
        calls: Calls of the blocks.
        states: Copies of the hidden states given to each block.
        inputs: Names and inputs of the targets called before the first block, and then from each
            block until the next.
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
    """Whether the targets first reached from this block on have the same inputs in both runs."""
    # Targets that are also called before this block belong to a pass that starts earlier.
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
    """Returns the hidden states in a block's output, or None if it contains anything else."""
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    return output if isinstance(output, Tensor) else None
