"""Model and batches in, covariances out: the only file of the calibration that touches hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from accelerate.utils import send_to_device, tqdm
from torch import Tensor, nn

from .masks import kept_rows, refuse_padding, token_mask
from .passes import Group
from .statistics import Covariance, CovarianceAccumulator

# Batch entries that only serve a loss.
_LABEL_KEYS = {"labels", "label", "label_ids", "start_positions", "end_positions"}

Batch = Mapping[str, Any]
# Called with a module's name and its input.
Visitor = Callable[[str, Tensor], None]


def discover_groups(
    model: nn.Module, targets: Mapping[str, nn.Module], batch: Batch
) -> list[Group]:
    """Which target modules are given the very same tensor, found by running one batch.

    Args:
        model, targets: as for `collect_covariances`.
        batch: any batch of the calibration data.

    Returns:
        The groups in the order of the forward pass; every called target is in one of them.

    Raises:
        TypeError, ValueError: as `collect_covariances`; also if a target was never called.
    """
    members: dict[str, list[str]] = {}
    features: dict[str, int] = {}
    calls: dict[str, int] = dict.fromkeys(targets, 0)
    sharing = _InputSharing()

    def visit(name: str, inputs: Tensor) -> None:
        calls[name] += 1
        leader = sharing.leader_of(name, inputs)
        if calls[name] == 1:
            members.setdefault(leader, []).append(name)
            features[leader] = inputs.shape[-1]

    with _evaluating(model), _visiting(targets, visit):
        _Runner(model, targets).run(batch)
    unused = [name for name, count in calls.items() if count == 0]
    if unused:
        raise ValueError(
            f"{unused[0]} ({len(unused)} in all) was never called during calibration. Leave it out "
            "of target_modules, or give batches that use it."
        )
    return [
        Group(tuple(names), features[leader], all(calls[name] == 1 for name in names))
        for leader, names in members.items()
    ]


def collect_covariances(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    groups: Sequence[Group],
    description: str = "Calibrating",
) -> dict[str, Covariance]:
    """Mean outer product of the inputs of each group, over the tokens that count.

    The model is run in evaluation mode without gradients, as far as the last of the groups, and left
    as it was, also after an error.

    Args:
        model: any module that takes a batch as keyword arguments.
        targets: modules of the model by name.
        batches: mappings of tensors, as a collator yields them. Tokens where `attention_mask`
            (`(batch, tokens)`) is 0 are left out.
        groups: from `discover_groups`; the covariance of a group is collected once.
        description: of the progress bar.

    Returns:
        Covariances by the name of the group's first module.

    Raises:
        TypeError: if a batch is not a mapping.
        ValueError: if there is no batch, no token that counts, an input that is not finite (the first
            module that saw one is named), an input shape that the mask cannot be laid over, or a
            group whose modules are given different inputs after all.
    """
    leader_of = {name: group.leader for group in groups for name in group.members}
    accumulators: dict[str, CovarianceAccumulator] = {}
    sharing = _InputSharing()
    watched = {name: targets[name] for name in leader_of}
    runner = _Runner(model, targets, stop_after=_stopping_point(model, groups))

    def visit(name: str, inputs: Tensor) -> None:
        found, leader = sharing.leader_of(name, inputs), leader_of[name]
        if name != leader and found != leader:
            raise ValueError(
                f"{name} had the same input as {leader} in one batch but not in another, so their "
                "statistics cannot be shared. Calibrate them separately: one calibrate() call with "
                "target_modules for each."
            )
        if name == leader:
            if name not in accumulators:
                accumulators[name] = CovarianceAccumulator(inputs.shape[-1], inputs.device)
            accumulators[name].update(kept_rows(name, inputs, runner.mask))
        runner.visited(name)

    count = 0
    with _evaluating(model), _visiting(watched, visit):
        for batch in tqdm(batches, desc=description):
            sharing.forget()
            runner.run(batch, count)
            _check_finite(accumulators)
            count += 1
    _check_counted(accumulators)
    return {name: accumulator.finish() for name, accumulator in accumulators.items()}


class _InputSharing:
    """Tells modules that are called one after the other with the very same tensor."""

    def __init__(self) -> None:
        self._last: tuple[str, Tensor, int] | None = None

    def leader_of(self, name: str, inputs: Tensor) -> str:
        """The first module of the run of calls with this tensor, unchanged, that `name` is in."""
        last = self._last
        if last is not None and last[1] is inputs and last[2] == inputs._version:
            return last[0]
        self._last = (name, inputs, inputs._version)
        return name

    def forget(self) -> None:
        """Let go of the last tensor."""
        self._last = None


class _Done(Exception):
    """Ends a forward pass behind the last module of interest."""


class _Runner:
    """Runs batches through the model, no further than needed."""

    def __init__(
        self, model: nn.Module, targets: Mapping[str, nn.Module], stop_after: str | None = None
    ) -> None:
        self._module = _shortest(model, targets)
        self._takes_cache = "use_cache" in inspect.signature(self._module.forward).parameters
        self._device = next(model.parameters()).device
        self._two_sequences = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._stop_after = stop_after
        self.mask: Tensor | None = None

    def run(self, batch: Batch, number: int = 0) -> None:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"Calibration batch {number} is a {type(batch).__name__}; expected a mapping from "
                "argument names to tensors, such as {'input_ids': …, 'attention_mask': …}, as "
                "tokenizers and collators give."
            )
        inputs = {key: value for key, value in batch.items() if key not in _LABEL_KEYS}
        inputs = send_to_device(inputs, self._device)
        self.mask = token_mask(inputs.get("attention_mask"))
        if self._two_sequences:
            refuse_padding(self.mask, token_mask(inputs.get("decoder_attention_mask")))
        if self._takes_cache:
            inputs["use_cache"] = False
        with suppress(_Done):
            self._module(**inputs)

    def visited(self, name: str) -> None:
        if name == self._stop_after:
            raise _Done


@contextmanager
def _visiting(targets: Mapping[str, nn.Module], visit: Visitor) -> Iterator[None]:
    """Call `visit` before each forward pass of each module."""
    with ExitStack() as stack:
        for name, module in targets.items():
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: visit(
                    name, args[0] if args else next(iter(kwargs.values()))
                ),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        yield


def _stopping_point(model: nn.Module, groups: Sequence[Group]) -> str | None:
    """The module behind which nothing is left to see, if that is certain."""
    if not all(group.called_once for group in groups):
        return None
    # accelerate's hooks move weights back after a module; they must not be cut off.
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return None
    return groups[-1].members[-1]


def _check_finite(accumulators: Mapping[str, CovarianceAccumulator]) -> None:
    # In the order of the forward pass: the first one is where the trouble starts.
    for name, accumulator in accumulators.items():
        if not torch.isfinite(accumulator.energy()):
            raise ValueError(
                f"The input of {name} has NaN or infinite values. Check the calibration data and the "
                "model in this dtype; float16 overflows easily, try bfloat16 or float32."
            )


def _check_counted(accumulators: Mapping[str, CovarianceAccumulator]) -> None:
    for name, accumulator in accumulators.items():
        if accumulator.tokens == 0:
            raise ValueError(
                f"The calibration data has no token that counts for {name}: every batch was empty or "
                "masked out by attention_mask. Check the tokenizer's padding and the mask."
            )


def _shortest(model: nn.Module, targets: Mapping[str, nn.Module]) -> nn.Module:
    """The model without its head where no target lies in the head: the logits are not needed."""
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    if isinstance(backbone, nn.Module) and all(name.startswith(prefix + ".") for name in targets):
        return backbone
    return model


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; each module's own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Not inference mode, whose tensors have no version to tell apart changed inputs by.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
