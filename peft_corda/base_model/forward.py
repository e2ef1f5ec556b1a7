"""Runs calibration batches through a model and shows what its modules are given.

This, `chain.py` and `blocks.py` are the only files of the calibration that touch a model's hooks and
forwards.
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

# What a run of a model costs beyond its tokens, in tokens: reading weights from memory; starting
# kernels, or bringing weights in from elsewhere.
_RUN_COST = 64
_HIGH_RUN_COST = 4096

# Called with a module's name, its input and, where that is asked for, its output.
Visitor = Callable[[str, Tensor, Tensor | None], None]


class _Done(Exception):
    """Ends a forward pass behind the last module of interest."""


class Runner:
    """Runs batches through a model, no further than needed.

    Attributes:
        model: takes a batch as keyword arguments.
        targets: modules of interest by name.
        mask: of the batch that is running: bool `(batch, tokens)`, or None if all tokens count.
        tokens: `(batch, tokens)` of the batch that is running, where known.
        stop_after: name of the module behind which the run of a batch ends, if any.
        device: that batches are moved to.
    """

    def __init__(
        self, model: nn.Module, targets: Mapping[str, nn.Module], without_padding: bool = False
    ) -> None:
        """
        Args:
            model: takes a batch as keyword arguments.
            targets: modules of interest by name; where none is in the model's head, the head is
                left out.
            without_padding: cut padding off and run sequences of equal length together, for models
                whose modules do not tell which tokens they are given.
        """
        self.model, self.targets = model, targets
        # Where weights are gathered, that is set up by the first call of the whole model.
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
        """A runner that cuts padding off, see `without_padding`."""
        cutting = copy(self)
        cutting._without_padding = True
        return cutting

    def parts(self, batch: Batch, number: int = 0) -> list[dict[str, Any]]:
        """What a batch is run as, without labels: itself, or parts with less padding or none.

        Raises:
            TypeError: if the batch is not a mapping.
            ValueError: if its mask is of an unknown shape, or has holes that cannot be cut out.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"Calibration batch {number} is a {type(batch).__name__}; expected a mapping from "
                "argument names to tensors, such as {'input_ids': …, 'attention_mask': …}, as "
                "tokenizers and collators give."
            )
        inputs = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
        if self._without_padding:
            return unpadded(inputs)
        return of_like_length(inputs, self._run_cost)

    def run(self, part: dict[str, Any]) -> None:
        """Run the model on one of the `parts` of a batch."""
        inputs = dict(send_to_device(part, self.device))
        self.mask = token_mask(inputs.get("attention_mask"))
        self.tokens = token_shape(inputs)
        if self._takes_cache:
            inputs["use_cache"] = False
        with suppress(_Done):
            self._module(**inputs)

    def visited(self, name: str) -> None:
        """To be told of each visited module: ends the run behind `stop_after`."""
        if name == self.stop_after:
            self.finish()

    def finish(self) -> None:
        """Called in a hook: end the run of this batch here."""
        raise _Done


@contextmanager
def visiting(
    modules: Mapping[str, nn.Module], visit: Visitor, with_output: Container[str] = ()
) -> Iterator[None]:
    """Call `visit` before each forward pass of each module, or after it if its output is wanted."""
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
    """Evaluation mode and no gradients; each module's own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes:
        # In evaluation mode bitsandbytes packs the weight anew on some CPUs, with rounded scales and no
        # way to train through it any more. Nothing else in such a layer asks for the mode.
        if quantization_of(module) == "4bit":
            module.training = True
    try:
        # Not inference mode, whose tensors have no version to tell apart changed inputs by.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        reshard(model)


def _shortest(model: nn.Module, targets: Mapping[str, nn.Module]) -> nn.Module:
    """The model without its head where no target lies in the head: the logits are not needed."""
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    if isinstance(backbone, nn.Module) and all(name.startswith(prefix + ".") for name in targets):
        return backbone
    return model
