"""Finds the target modules that share an input, and the order in which they are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..batches.batches import Batch
from ..batches.masks import is_broadcastable
from .forward import Runner, evaluating, visiting
from .weights import weight_shape


@dataclass(frozen=True)
class Layout:
    """Layout of the target modules, as observed in runs of the model.

    Attributes:
        groups: Groups in the order of the forward pass. Every target is in one of them.
        masked: Whether an attention mask tells, for each of them, which input rows are padding.
        at_once: Whether one batch reaches every target. If not, the order of the groups may be
            another one than that of a forward pass.
    """

    groups: list[Group]
    masked: bool
    at_once: bool = True


def with_cross(groups: Sequence[Group], targets: Mapping[str, nn.Module]) -> list[Group]:
    """Returns the groups, with the cross-covariance of outputs and inputs where that is smaller.

    `Σ y xᵀ = W Σ x xᵀ` takes at most half the work and memory for a wide weight (such as the down
    projection of a transformer). It includes the rounding of the outputs, which does not affect the
    largest directions of `W C` but would affect the smallest, so it is valid only for `"ipm"`.
    """

    def chosen(group: Group) -> Group:
        outputs = weight_shape(targets[group.leader])[0]
        smaller = len(group.members) == 1 and 2 * outputs <= group.features
        return replace(group, outputs=outputs) if smaller else group

    return [chosen(group) for group in groups]


class InputSharing:
    """Detects modules that are called in succession with the very same tensor."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int] | None = None
        self._number = 0

    def number_of(self, inputs: Tensor) -> int:
        """Numbers the inputs; the last tensor, if unchanged, has the same number again."""
        last = self._last
        if last is None or last[0] is not inputs or last[1] != inputs._version:
            self._last = (inputs, inputs._version)
            self._number += 1
        return self._number

    def forget(self) -> None:
        """Releases the last tensor."""
        self._last = None


def discover(runner: Runner, batch: Batch, more: Iterable[Batch] = ()) -> Layout:
    """Runs one example to find out which target modules are given the very same tensor.

    Args:
        runner: Runner of the model and its target modules.
        batch: Any batch of the calibration data. It is run in full only if its first example does not
            reach every target (as with experts routed by token), or if a target is given rows that
            are not in sequences, whose number in a single example may be a coincidence.
        more: Further batches, of which no more are taken than it takes to reach every target.

    Raises:
        TypeError: If the batch is not a mapping.
        ValueError: If the mask has an unsupported shape or leaves no token, or if a target was never
            called.
    """
    targets, parts = runner.targets, runner.parts(batch)
    if not parts:
        raise ValueError(
            "The first calibration batch has no token that counts: attention_mask is 0 everywhere. "
            "Check the tokenizer's padding and the attention_mask."
        )
    example = runner.example(parts[0])
    calls, looked_at, runs = _Calls(targets, runner), 1, 1
    with evaluating(runner.model), visiting(targets, lambda *seen: calls.visit(*seen)):
        if example is not None:
            runner.run(example)
        if calls.missing() or calls.in_rows:
            before, calls, runs = calls, _Calls(targets, runner), len(parts)
            for part in parts:
                runner.run(part)
            calls.masked &= before.masked
        others = iter(more)
        while calls.missing() and (other := next(others, None)) is not None:
            looked_at += 1
            for part in runner.parts(other, looked_at - 1):
                runner.run(part)
    missing = calls.missing()
    if missing:
        raise ValueError(
            f"{missing[0]} ({len(missing)} in all) was never called during calibration: none of "
            f"the {looked_at} batches reaches it. Leave it out of target_modules, or give batches that "
            "use it."
        )
    # What is called in one run and not in another may be called several times in a third.
    return calls.layout(at_once=looked_at == 1, one_run=looked_at == runs == 1)


def layout_of(runner: Runner, part: Batch) -> Layout:
    """As `discover`, from one run of a batch without padding, which may be on the meta device."""
    calls = _Calls(runner.targets, runner)
    with evaluating(runner.model), visiting(runner.targets, calls.visit):
        runner.run(dict(part))
    return calls.layout(at_once=True, one_run=True)


class _Calls:
    """Records the calls of the targets and their inputs.

    Attributes:
        masked: Whether the mask could be broadcast to every input so far.
        in_rows: Whether any input consisted of rows, not of sequences.
    """

    def __init__(self, targets: Mapping[str, nn.Module], runner: Runner) -> None:
        self._targets = targets
        self._inputs: dict[str, list[int]] = {}
        self._features: dict[str, int] = {}
        self._sharing = InputSharing()
        self._runner = runner
        self.masked = True
        self.in_rows = False

    def visit(self, name: str, inputs: Tensor, _: Tensor | None = None) -> None:
        self._runner.refuse_stacked(inputs)
        tokens = self._runner.tokens
        self.masked &= tokens is None or is_broadcastable(tuple(inputs.shape[:-1]), tokens)
        self.in_rows |= tokens is not None and inputs.ndim == 2
        self._inputs.setdefault(name, []).append(self._sharing.number_of(inputs))
        self._features[name] = inputs.shape[-1]

    def missing(self) -> list[str]:
        return [name for name in self._targets if name not in self._inputs]

    def layout(self, at_once: bool, one_run: bool) -> Layout:
        # Modules that are called several times share a covariance only if they share every input.
        members: dict[tuple[int, ...], list[str]] = {}
        for name, inputs in self._inputs.items():
            members.setdefault(tuple(inputs), []).append(name)
        groups = [
            Group(tuple(names), self._features[names[0]], one_run and len(inputs) == 1)
            for inputs, names in members.items()
        ]
        return Layout(groups, self.masked, at_once)


_FLOAT32 = 4


@dataclass(frozen=True)
class Group:
    """Target modules that are given the very same input, and so share one covariance.

    Attributes:
        members: Names of the modules, in the order of the forward pass.
        features: Input dimensions.
        called_once: Whether each module was called exactly once in a forward pass, for certain.
        outputs: Output dimensions if the cross-covariance of outputs and inputs is collected instead
            of the covariance of the inputs, else None.
    """

    members: tuple[str, ...]
    features: int
    called_once: bool = True
    outputs: int | None = None

    @property
    def leader(self) -> str:
        """Name of the module whose input is observed."""
        return self.members[0]

    def bytes(self, itemsize: int = _FLOAT32) -> int:
        """Returns the memory of the covariance sum in bytes."""
        rows = self.features if self.outputs is None else self.outputs + 1
        return itemsize * self.features * rows
