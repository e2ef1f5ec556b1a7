"""Runs calibration batches through a model and observes the inputs of its modules.

Only this module, `block_chain` and `hidden_state_cache` use a model's hooks or replace its forwards
during calibration.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn

from kprune_ext.common.placement import execution_device, is_offloaded, reshard, sharding_of
from kprune_ext.common.text_data import LABEL_KEYS

from .batches import Batch, of_like_length, token_shape, unpadded
from .masks import token_mask
from .quantized import quantization_of

# Fixed cost of a forward pass, in tokens: reading weights from memory; or, the higher one,
# launching kernels, or loading offloaded and gathering sharded weights.
_RUN_COST = 64
_HIGH_RUN_COST = 4096

# Called with a module's name, its input and, where requested, its output.
Visitor = Callable[[str, Tensor, Tensor | None], None]


class _Done(Exception):
    """Ends a forward pass after the last module of interest."""


class Runner:
    """Runs batches through a model, no further than needed.

    Attributes:
        model: The model, which takes a batch as keyword arguments.
        targets: Modules of interest by name.
        mask: Mask of the current batch, bool `(batch, tokens)`, or None if all tokens count.
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
        self._module = model if sharding_of(model) else _shortest(model, targets)
        inner = model.get_base_model() if isinstance(model, PeftModel) else self._module
        self._takes_cache = "use_cache" in inspect.signature(inner.forward).parameters
        self.device = execution_device(model)
        near = self.device.type == "cpu" and not is_offloaded(model) and not sharding_of(model)
        self._run_cost = _RUN_COST if near else _HIGH_RUN_COST
        two_sequences = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._without_padding = without_padding or two_sequences
        self.stop_after: str | None = None
        self.mask: Tensor | None = None
        self.tokens: tuple[int, int] | None = None

    def cutting_padding(self) -> Runner:
        """Returns a copy of the runner that cuts padding off (see `without_padding`)."""
        cutting = copy(self)
        cutting._without_padding = True
        return cutting

    def parts(self, batch: Batch, number: int = 0) -> list[dict[str, Any]]:
        """Returns the parts that a batch is run as, without labels and with less or no padding.

        Args:
            batch: The batch, which may be the only part.
            number: Number of the batch, for the error message.

        Raises:
            TypeError: If the batch is not a mapping.
            ValueError: If its mask has an unsupported shape, or holes that cannot be cut out.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"Calibration batch {number} is a {type(batch).__name__}; expected a mapping from "
                "argument names to tensors, such as {'input_ids': …, 'attention_mask': …}, as "
                "returned by tokenizers and data collators."
            )
        inputs = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
        if self._without_padding:
            return unpadded(inputs)
        return of_like_length(inputs, self._run_cost)

    def run(self, part: dict[str, Any]) -> None:
        """Runs the model on one of the `parts` of a batch."""
        inputs = dict(send_to_device(part, self.device))
        self.mask = token_mask(inputs.get("attention_mask"))
        self.tokens = token_shape(inputs)
        if self._takes_cache:
            inputs["use_cache"] = False
        with suppress(_Done):
            self._module(**inputs)

    def visited(self, name: str) -> None:
        """Ends the run after the module `stop_after`; must be called for each visited module."""
        if name == self.stop_after:
            self.finish()

    def finish(self) -> None:
        """Ends the run of this batch; must be called in a hook."""
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


def _shortest(model: nn.Module, targets: Mapping[str, nn.Module]) -> nn.Module:
    """Returns the model without its head if no target is in the head, as logits are not needed."""
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    if isinstance(backbone, nn.Module) and all(name.startswith(prefix + ".") for name in targets):
        return backbone
    return model
