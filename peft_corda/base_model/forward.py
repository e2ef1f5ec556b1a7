"""Runs calibration batches through a model and observes the inputs of its modules.

Only this module, `model_parts`, `block_chain` and `hidden_state_cache` use a model's hooks or
replace its forwards during calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from kprune_ext.common.data.token_ids import require_known_tokens
from kprune_ext.common.placement import execution_device, is_offloaded, reshard, sharding_of
from kprune_ext.common.text_data import LABEL_KEYS

from ..batches.batch_values import checked, is_empty, rows_belong, token_shape
from ..batches.batches import Batch, first_example, of_like_length, unpadded
from ..batches.decoder_inputs import counted_targets, kept_apart, takes_targets, with_targets
from ..batches.masks import Side, mask_of_side, token_mask
from .model_parts import (
    arguments_of,
    holds_images,
    sides_differ,
    text_begins,
    text_model_of,
    unwrapped,
    without_head,
)
from .quantized import quantization_of

# Fixed cost of a forward pass, in tokens: reading weights from memory; or, the higher one,
# launching kernels, or loading offloaded and gathering sharded weights.
_RUN_COST = 64
_HIGH_RUN_COST = 4096

# Called with a module's name, its input and, where requested, its output.
Visitor = Callable[[str, Tensor, Tensor | None], None]


class _Done(Exception):
    """Ends a forward pass after the last module of interest."""


class _StackedError(ValueError):
    """Tokens have a dimension too many."""


class Runner:
    """Runs batches through a model, no further than needed.

    Attributes:
        model: The model, which takes a batch as keyword arguments.
        targets: Modules of interest by name.
        tokens: Shape `(batch, tokens)` of the current batch, if known.
        stop_after: Name of the module after which the run of a batch ends, if any.
        device: Device that batches are moved to.
    """

    def __init__(
        self, model: nn.Module, targets: Mapping[str, nn.Module], without_padding: bool = False
    ) -> None:
        """
        Args:
            model: The model, which takes a batch as keyword arguments.
            targets: Modules of interest by name. If none of them is in the model's head, the head is
                not run.
            without_padding: Whether to cut padding off and batch sequences of equal length, for
                models whose module inputs do not show which tokens they belong to.
        """
        self.model, self.targets = model, targets
        # Gathering of sharded weights is set up by the first call of the full model.
        self._shorter = model if sharding_of(model) else without_head(model, targets)
        self._named = arguments_of(model)
        self._takes_targets = takes_targets(unwrapped(model))
        self.device = execution_device(model)
        near = self.device.type == "cpu" and not is_offloaded(model) and not sharding_of(model)
        self._run_cost = _RUN_COST if near else _HIGH_RUN_COST
        config = getattr(model, "config", None)
        self._two_sequences = bool(getattr(config, "is_encoder_decoder", False))
        self._without_padding = without_padding or self._two_sequences
        self._image_token = getattr(
            config, "image_token_id", getattr(config, "image_token_index", None)
        )
        self.stop_after: str | None = None
        self.tokens: tuple[int, int] | None = None
        self._mask: Tensor | None = None
        self._sides: tuple[Side, ...] = ()
        self._stacked: tuple[int, ...] | None = None
        self._before_text = False
        self._may_stop = True

    def cutting_padding(self) -> Runner:
        """Returns a copy of the runner that cuts padding off (see `without_padding`)."""
        cutting = copy(self)
        cutting._without_padding = True
        return cutting

    def parts(self, batch: Batch, number: int = 0) -> list[dict[str, Any]]:
        """Returns the parts that a batch is run as, with less or no padding.

        Labels are left out, unless they are what a decoder is given. A batch is taken apart only if it
        is certain which values belong to which row.

        Args:
            batch: The batch, which may be the only part; an empty one has no part.
            number: Number of the batch, for the error message.

        Raises:
            TypeError: If the batch is not a mapping.
            ValueError: If its mask has an unsupported shape, or holes that cannot be cut out, or if the
                model does not know its tokens.
        """
        values = checked(batch, number)
        if is_empty(values):
            return []
        require_known_tokens(unwrapped(self.model), values.get("input_ids"))
        inputs = {
            key: value
            for key, value in values.items()
            if key not in LABEL_KEYS or self._named.get(key, False)
        }
        if self._takes_targets:
            inputs.pop("labels", None)
            inputs = with_targets(unwrapped(self.model), inputs, values.get("labels"))
        if not self._without_padding:
            return of_like_length(inputs, self._run_cost)
        parts = [inputs]
        if rows_belong(inputs, self._image_token):
            # A model that is given labels may have a loss that asks for a mask.
            loss = "labels" in inputs and not any(key.startswith("decoder_input") for key in inputs)
            parts = unpadded(inputs, keeps_masks=loss)
        return [kept_apart(part) for part in parts] if self._takes_targets else parts

    def check(self, batch: Batch, number: int) -> None:
        """Raises the errors of `parts` that the types, shapes and tokens of a batch show."""
        require_known_tokens(unwrapped(self.model), checked(batch, number).get("input_ids"))

    def example(self, part: Batch) -> dict[str, Any] | None:
        """Returns the first row of a part, or None (see `batches.first_example`)."""
        return first_example(part, self._image_token)

    def run(self, part: dict[str, Any]) -> None:
        """Runs the model on one of the `parts` of a batch.

        Raises:
            ValueError: If the model cannot be run on tokens of this shape.
        """
        inputs = dict(send_to_device(part, self.device))
        self._look_at(inputs)
        self._before_text = False
        if self._takes_targets and any(key.startswith("decoder_input") for key in inputs):
            inputs.pop("labels", None)
        module = self._module_for(inputs)
        if "use_cache" in arguments_of(unwrapped(module)):
            inputs["use_cache"] = False
        ids = inputs.get("input_ids")
        try:
            with suppress(_Done), self._noticing(inputs):
                module(**inputs)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            if not isinstance(ids, Tensor) or ids.ndim == 2 or isinstance(error, _StackedError):
                raise
            raise ValueError(
                f"{type(self.model).__name__} cannot be run on input_ids of shape {tuple(ids.shape)}: "
                f"{error}. Give batches of shape (batch, tokens)."
            ) from error

    def mask_for(self, inputs: Tensor) -> Tensor | None:
        """Returns the mask for the input of a module in the current run; None if all of it counts.

        Raises:
            ValueError: If the model has taken another dimension of `input_ids` for tokens.
        """
        self.refuse_stacked(inputs)
        if self._before_text:
            return None
        if self._two_sequences:
            return mask_of_side(tuple(inputs.shape[:-1]), self._sides)
        return self._mask

    def refuse_stacked(self, inputs: Tensor) -> None:
        """Raises an error if tokens `(…, batch, tokens)` came to a module of transformers as they are.

        Such a model does not fail on them, but takes the batch for the tokens.
        """
        if self._stacked == tuple(inputs.shape[:-1]) and isinstance(
            unwrapped(self.model), PreTrainedModel
        ):
            raise _StackedError(
                f"{type(self.model).__name__} takes input_ids of shape (batch, tokens), got "
                f"{self._stacked}. Give batches of two dimensions."
            )

    def _look_at(self, inputs: Mapping[str, Any]) -> None:
        """Notes which of the tokens of a part count."""
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        stacked = isinstance(ids, Tensor) and ids.ndim > 2
        self._stacked = tuple(ids.shape) if stacked and isinstance(ids, Tensor) else None
        if isinstance(ids, Tensor) and ids.ndim == 3 and isinstance(mask, Tensor):
            mask = mask.flatten(0, 1) if mask.shape == ids.shape else mask
        self._mask = token_mask(mask)
        self.tokens = token_shape(inputs)
        # With images, the number of calls may differ from batch to batch.
        self._may_stop = not holds_images(inputs)
        if self._two_sequences:
            labels, ids = inputs.get("labels"), inputs.get("decoder_input_ids")
            own = token_mask(inputs.get("decoder_attention_mask"))
            targets = counted_targets(labels)
            both = own if targets is None else targets if own is None else own & targets
            tokens = next((v for v in (both, ids, labels) if isinstance(v, Tensor)), None)
            shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])
            known = isinstance(inputs.get("input_ids", inputs.get("inputs_embeds")), Tensor)
            self._sides = (Side(self.tokens if known else None, self._mask), Side(shape, both))

    def _module_for(self, inputs: Mapping[str, Any]) -> nn.Module:
        """Returns the model without its head, unless the model itself does more with the inputs."""
        if self._shorter is self.model:
            return self.model
        ids, own = inputs.get("input_ids"), arguments_of(self._shorter)
        given = any(key.startswith("decoder_input") for key in inputs)
        if (
            (self._two_sequences and not given)
            or (isinstance(ids, Tensor) and ids.ndim != 2)
            or any(key not in own for key in inputs if key in self._named)
        ):
            return self.model
        return self._shorter

    @contextmanager
    def _noticing(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Notices what the masks depend on: see `text_begins` and `sides_differ`."""
        if self._two_sequences:
            with sides_differ(self.model, self._sides):
                yield
            return
        images = self._mask is not None and holds_images(inputs)
        text = text_model_of(self.model) if images else None
        self._before_text = text is not None
        with text_begins(text, lambda: setattr(self, "_before_text", False)):
            yield

    def visited(self, name: str) -> None:
        """Ends the run after the module `stop_after`; must be called for each visited module."""
        if name == self.stop_after:
            self.finish()

    def finish(self) -> None:
        """Ends the run of this batch, if that is certain to be right; must be called in a hook."""
        if self._may_stop:
            raise _Done


@contextmanager
def visiting(
    modules: Mapping[str, nn.Module], visit: Visitor, with_output: Container[str] = ()
) -> Iterator[None]:
    """Calls `visit` before each forward pass of a module, or after it for modules in `with_output`."""
    with ExitStack() as stack:
        for name, module in modules.items():

            def see(
                _: nn.Module, args: Any, kwargs: Any, output: Any = None, name: str = name
            ) -> None:
                visit(name, args[0] if args else next(iter(kwargs.values())), output)

            register = (
                module.register_forward_hook
                if name in with_output
                else module.register_forward_pre_hook
            )
            stack.callback(register(see, with_kwargs=True).remove)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode and disables gradients; restores each module's mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes:
        # In evaluation mode, bitsandbytes repacks the weight on some CPUs, with rounded scales and
        # without support for training afterwards. Nothing else in such a layer depends on the mode.
        if quantization_of(module) == "4bit":
            module.training = True
    try:
        # Not inference mode, whose tensors have no version counter to detect in-place changes by.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        reshard(model)
