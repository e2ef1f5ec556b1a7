"""Running an encoder in pieces: up to its first layer, and from its last layer to the logits.

Everything here restores the model, even after an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures.row import Architecture, Context
from ..architectures.tasks import Predict
from ..common.placement import execution_device
from ..units.sublayers import layers_path
from .hooks import stopping_before
from .inputs import Entries

Inputs = Mapping[str, Any]
# Names of a cache among a layer's arguments; transformers 5.24 has changed it.
_CACHES = ("past_key_values", "cache")


class _Enough(BaseException):
    """Ends a forward pass once all arguments of interest are recorded.

    No `Exception`, which the user's `predict` might catch.
    """


class _StandIn(nn.Module):
    """Replacement of a transformer layer, with its attributes but without its weights."""

    def __init__(self, layer: nn.Module, answer: Callable[[tuple[Any, ...], dict], Any]) -> None:
        super().__init__()
        # A hook of accelerate stores its forward as an attribute of the layer.
        own = {
            name: value
            for name, value in vars(layer).items()
            if not name.startswith("_") and name != "forward"
        }
        self.__dict__.update(own)
        self._answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answer: Callable[..., Any] = self.__dict__["_answer"]
        return answer(args, kwargs)


class LayerStack:
    """A supported model as a stack of sub-layers, with `enter` below and `predict` above them.

    Args:
        model: The model, in evaluation mode.
        architecture: The model's table row.
        predict: Runs the model on a batch; by default the model is called with it.
    """

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, predict: Predict | None = None
    ) -> None:
        self.model = model
        self._runs = predict
        self._path = layers_path(model, architecture)
        self._layers: list[nn.Module] = list(model.get_submodule(self._path).children())
        self._gives_tuples: bool | None = None

    @torch.no_grad()
    def enter(self, inputs: Inputs) -> tuple[Tensor, list[Context]]:
        """Computes the hidden states before the first layer, and each layer's other arguments.

        Args:
            inputs: Inputs of the model, each `(batch, …)`.

        Returns:
            The hidden states `(batch, tokens, hidden)`, and per layer its arguments by name.
        """
        self._look(inputs)
        contexts: list[Context] = []
        entered: list[Tensor] = []

        def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, context = _bind(self._layers[len(contexts)], args, kwargs)
            entered.append(hidden)
            contexts.append(context)
            if len(contexts) == len(self._layers):
                raise _Enough
            return self._wrapped(hidden)

        with self._replaced_layers(note), suppress(_Enough):
            self._run(inputs)
        if len(contexts) < len(self._layers):
            raise _unreached()
        return entered[0], contexts

    def predict(self, predict: Predict, inputs: Inputs, hidden: Tensor) -> Tensor:
        """Computes the model's predictions from given hidden states after its last layer.

        Args:
            predict: Computes the predictions, `(model, batch) -> logits`.
            inputs: Inputs of the model, each `(batch, …)`.
            hidden: Hidden states that replace the last layer's, `(batch, tokens, hidden)`.

        Returns:
            Logits `(batch, positions, classes)`; a result `(batch, classes)` of `predict` becomes one
            position.

        Raises:
            TypeError: If `predict` does not return a tensor.
            ValueError: If its shape is neither `(batch, classes)` nor `(batch, positions, classes)`.
        """
        self._look(inputs)
        with self._replaced_layers(lambda args, kwargs: self._wrapped(hidden)):
            logits = predict(self.model, Entries(inputs))
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"predict returned a {type(logits).__name__}, but must return a tensor of logits, "
                "such as model(**batch).logits."
            )
        if logits.ndim not in (2, 3) or len(logits) != len(hidden):
            raise ValueError(
                f"predict returned a tensor of shape {tuple(logits.shape)} for {len(hidden)} samples, "
                "but must return (batch, classes) or (batch, positions, classes)."
            )
        return logits if logits.ndim == 3 else logits.unsqueeze(1)

    @torch.no_grad()
    def _look(self, inputs: Inputs) -> None:
        """Finds out, once, whether the layers return tuples or tensors."""
        if self._gives_tuples is None:
            with stopping_before(self._layers[0]) as calls:
                self._run(inputs)
            if not calls:
                raise _unreached()
            args, kwargs = send_to_device(calls[0], execution_device(self._layers[0]))
            self._gives_tuples = isinstance(self._layers[0](*args, **kwargs), tuple)

    def _run(self, inputs: Inputs) -> None:
        """Runs the model as it will be used; the dict is the callee's own, to change as it likes."""
        if self._runs is None:
            self.model(**inputs)
        else:
            self._runs(self.model, Entries(inputs))

    def _wrapped(self, hidden: Tensor) -> Any:
        return (hidden, None) if self._gives_tuples else hidden

    @contextmanager
    def _replaced_layers(
        self, answer: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    ) -> Iterator[None]:
        parent, _, name = self._path.rpartition(".")
        holder: Any = self.model.get_submodule(parent)
        own = getattr(holder, name)
        setattr(holder, name, nn.ModuleList([_StandIn(layer, answer) for layer in self._layers]))
        try:
            yield
        finally:
            setattr(holder, name, own)


def _unreached() -> ValueError:
    return ValueError(
        "predict did not run the layers of the model. It must call the model that it is given with "
        "the batch, such as: lambda model, batch: model(**batch).logits"
    )


def as_logits(found: Any, samples: int) -> Tensor:
    """Returns the result of a function `predict` as `(batch, positions, classes)`.

    Args:
        found: What it returned.
        samples: Number of samples in its batch.

    Raises:
        TypeError: If that is not a tensor.
        ValueError: If its shape is neither `(batch, classes)` nor `(batch, positions, classes)`.
    """
    if not isinstance(found, Tensor):
        raise TypeError(
            f"predict returned a {type(found).__name__}, but must return a tensor of logits, "
            "such as model(**batch).logits."
        )
    if found.ndim not in (2, 3) or len(found) != samples:
        raise ValueError(
            f"predict returned a tensor of shape {tuple(found.shape)} for {samples} samples, "
            "but must return (batch, classes) or (batch, positions, classes)."
        )
    return found if found.ndim == 3 else found.unsqueeze(1)


def _bind(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    signature = inspect.signature(layer.forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    hidden = arguments.pop(next(iter(signature.parameters)))
    for name in _CACHES:  # a cache would grow with every run of a sub-layer
        arguments.pop(name, None)
    return hidden, arguments


@contextmanager
def plain_outputs(config: Any) -> Iterator[None]:
    """Makes a model return named outputs without hidden states, attention weights and a cache."""
    wanted = {
        "output_hidden_states": False,
        "output_attentions": False,
        "return_dict": True,
        "use_cache": False,
    }
    before = dict(vars(config))
    for name in wanted:
        if hasattr(config, name):
            setattr(config, name, wanted[name])
    try:
        yield
    finally:
        # Past the setters, which refuse values that a config may well be loaded with.
        for name in {name for name in vars(config) if name.lstrip("_") in wanted}:
            vars(config).pop(name)
            if name in before:
                vars(config)[name] = before[name]


def arguments_of(model: PreTrainedModel) -> set[str]:
    """Returns the arguments of a forward, also those that a user's own passes on as `**kwargs`."""
    found: set[str] = set()
    every = [vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind)]
    for forward in (model.forward, *every):
        parameters = inspect.signature(forward).parameters
        found |= set(parameters) - {"self", "input"}
        if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            break
        if getattr(forward, "__module__", "").startswith("transformers."):
            break
    return found
