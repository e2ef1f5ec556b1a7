"""Model and batches in, covariances out: the only file of the calibration that touches hooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device, tqdm
from torch import Tensor, nn

from .statistics import Covariance, CovarianceAccumulator

# Batch entries that only serve a loss.
_LABEL_KEYS = {"labels", "label", "label_ids", "start_positions", "end_positions"}


def collect_covariances(
    model: nn.Module, targets: Mapping[str, nn.Module], dataloader: Iterable[Mapping[str, Any]]
) -> dict[str, Covariance]:
    """Mean outer product of the inputs of each target module, over the tokens that count.

    Modules that are given the very same tensor (q, k and v projections; gate and up) share one
    `Covariance`. The model is run in evaluation mode without gradients and left as it was, also
    after an error.

    Args:
        model: any module that takes a batch as keyword arguments.
        targets: modules of the model by name.
        dataloader: batches as a collator yields them. Tokens where `attention_mask`
            (`(batch, tokens)`) is 0 are left out.

    Raises:
        TypeError: if a batch is not a mapping.
        ValueError: if there is no batch, no token that counts, an input that is not finite (the
            first module that saw one is named), or an input shape that the mask cannot be laid over.
    """
    collector = _Collector()
    with _evaluating(model), collector.attached(targets):
        runner = _shortest_runner(model, targets)
        accepted = inspect.signature(runner.forward).parameters
        device = next(model.parameters()).device
        batches = 0
        for batch in tqdm(dataloader, desc="Calibrating"):
            _check_batch(batch, batches)
            batch = send_to_device({k: v for k, v in batch.items() if k not in _LABEL_KEYS}, device)
            collector.start_batch(batch.get("attention_mask"))
            if "use_cache" in accepted:
                batch = {**batch, "use_cache": False}
            runner(**batch)
            collector.check_finite()
            batches += 1
    if batches == 0:
        raise ValueError(
            "The calibration data is empty: the dataloader yielded no batch. Pass an iterable of "
            "batches; an iterator or generator can be used only once."
        )
    return collector.finish(targets)


class _Collector:
    """Accumulators by module name, fed by forward hooks."""

    def __init__(self) -> None:
        self._leader: dict[str, str] = {}  # module -> the module whose accumulator it shares
        self._accumulators: dict[str, CovarianceAccumulator] = {}
        self._mask: Tensor | None = None
        self._last: tuple[str, Tensor, int] | None = None  # leader, its input, version of that

    @contextmanager
    def attached(self, targets: Mapping[str, nn.Module]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in targets.items():
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: self._see(name, args, kwargs),
                    with_kwargs=True,
                )
                stack.callback(handle.remove)
            yield
        self._last = None

    def start_batch(self, attention_mask: Any) -> None:
        if attention_mask is not None and getattr(attention_mask, "ndim", None) != 2:
            raise ValueError(
                "attention_mask must have shape (batch, tokens), got "
                f"{tuple(getattr(attention_mask, 'shape', ()))}. Give a mask that is 1 for tokens "
                "that count and 0 for padding."
            )
        self._mask = None if attention_mask is None else attention_mask.bool()
        self._last = None

    def _see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        last = self._last
        shared = last is not None and last[1] is inputs and last[2] == inputs._version
        leader = self._leader.setdefault(name, last[0] if shared and last else name)
        if leader != name:
            if not shared or last is None or last[0] != leader:
                raise ValueError(
                    f"{name} had the same input as {leader} in one batch but not in another, so their "
                    "statistics cannot be shared. Calibrate them separately: one calibrate() call "
                    "with target_modules for each."
                )
            return
        self._last = (name, inputs, inputs._version)
        accumulator = self._accumulators.get(name)
        if accumulator is None:
            accumulator = CovarianceAccumulator(inputs.shape[-1], inputs.device)
            self._accumulators[name] = accumulator
        accumulator.update(kept_rows(name, inputs, self._mask))

    def check_finite(self) -> None:
        self._last = None
        # In the order of the forward pass: the first one is where the trouble starts.
        for name, accumulator in self._accumulators.items():
            if not torch.isfinite(accumulator.energy()):
                raise ValueError(
                    f"The input of {name} has NaN or infinite values. Check the calibration data and "
                    "the model in this dtype; float16 overflows easily, try bfloat16 or float32."
                )

    def finish(self, targets: Mapping[str, nn.Module]) -> dict[str, Covariance]:
        unused = [name for name in targets if name not in self._leader]
        if unused:
            raise ValueError(
                f"{unused[0]} ({len(unused)} in all) was never called during calibration. Leave it "
                "out of target_modules, or give batches that use it."
            )
        starved = [name for name, a in self._accumulators.items() if a.tokens == 0]
        if starved:
            raise ValueError(
                f"The calibration data has no token that counts for {starved[0]}: every batch was "
                "empty or masked out by attention_mask. Check the tokenizer's padding and the mask."
            )
        finished = {name: a.finish() for name, a in self._accumulators.items()}
        return {name: finished[self._leader[name]] for name in targets}


def kept_rows(name: str, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Input rows `(tokens, in)` of the tokens that count.

    Args:
        name: the module, for the error message.
        inputs: `(batch, tokens, in)`, `(batch · tokens, in)`, or `(batch, in)` for a module that
            sees one vector a sequence (a pooler), which counts if its sequence has any token.
        mask: bool `(batch, tokens)`, or None if all count.

    Raises:
        ValueError: for any other shape.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    if mask is None:
        return rows
    mask = mask.to(inputs.device)
    leading = tuple(inputs.shape[:-1])
    if leading == tuple(mask.shape) or leading == (mask.numel(),):
        return rows[mask.reshape(-1)]
    if leading == (mask.shape[0],):
        return rows[mask.any(dim=1)]
    raise ValueError(
        f"The input of {name} has shape {tuple(inputs.shape)}, which the attention_mask of shape "
        f"{tuple(mask.shape)} cannot be laid over, so padding cannot be told from text. Leave the "
        "module out of target_modules, or give batches without padding and without attention_mask."
    )


def _shortest_runner(model: nn.Module, targets: Mapping[str, nn.Module]) -> nn.Module:
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


def _check_batch(batch: Any, index: int) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Calibration batch {index} is a {type(batch).__name__}; expected a mapping from argument "
            "names to tensors, such as {'input_ids': …, 'attention_mask': …}, as tokenizers and "
            "collators give."
        )
