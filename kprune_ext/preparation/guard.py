"""Checks of the copy that is to be pruned, before any work: it predicts what the model predicts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.tasks import Predict
from ..model_layers.device_map import DeviceMap, input_device
from ..model_layers.hooks import evaluating
from ..model_layers.inputs import Entries
from ..model_layers.layer_stack import as_logits, plain_outputs
from ..modeling.classes import is_stock, stock_class
from ..modeling.restoring import as_loaded, lost_on_loading
from ..samples.samples import Sample
from .given import Given

_MOST_NAMED = 4


@torch.no_grad()
def check_copy(
    given: Given, whole: Any, layers: str, device_map: DeviceMap, sample: Sample | None
) -> None:
    """Checks that a copy predicts what its model predicts, and that it can be saved.

    Args:
        given: The model.
        whole: Its copy, of which nothing is pruned yet. `kprune_unsaved` of the model in it is set.
        layers: Path of the list of transformer layers in the model.
        device_map: Device map of the copy.
        sample: A sample to predict from; without it only what can be seen in the modules is checked.

    Raises:
        ValueError: If predictions differ, or do not come from the model that `predict` is called with.
        TypeError: If `predict` does not return a tensor.
    """
    pruned = whole.get_submodule(given.path)
    # A model on several devices runs only with accelerate's hooks, which the copy does not have yet.
    runs = len(set(device_map.values())) == 1
    found = inputs = None
    if sample is not None and runs:
        inputs = sample.inputs.to(input_device(pruned))
        with (
            evaluating(given.whole),
            plain_outputs(given.model.config),
            plain_outputs(pruned.config),
        ):
            found = _same_predictions(given, whole, layers, inputs)
    lost = lost_on_loading(pruned)
    changing = list(lost.changing)
    other = list(lost.other)
    if given.model.config.output_attentions and not pruned.config.output_attentions:
        other.append("config.output_attentions, which transformers saves for eager attention only")
    if stock_class(type(pruned)) is not None and found is not None and inputs is not None:
        with plain_outputs(pruned.config), as_loaded(pruned) as some:
            plain = _tried(given.predict, whole, inputs) if some else found
            if plain is None or not _alike(plain, found, _tolerance(found, given.model)):
                changing.append(
                    f"code of {type(given.model).__name__} that is not in a checkpoint (its class, a "
                    "forward or a hook) changes the predictions"
                )
            elif not is_stock(type(given.model)):
                other.append(f"the code of {type(given.model).__name__}")
    _tell(pruned, changing, other)


def _tell(pruned: Any, changing: list[str], other: list[str]) -> None:
    """Warns of what a checkpoint will lack, and records why the model cannot be saved, if so."""
    pruned.kprune_unsaved = _listed(changing) if changing else None
    if changing:
        warnings.warn(
            "The pruned model works in memory, but save_pretrained will refuse to save it, because "
            f"from_pretrained would build a model with other predictions: {_listed(changing)}. To "
            "save it, give these parts to a model without them after pruning, or save a state dict.",
            UserWarning,
            stacklevel=2,
        )
    elif other:
        warnings.warn(
            "These parts are kept in memory, but a saved checkpoint of the pruned model will be "
            f"loaded without them: {_listed(other)}. Its predictions do not depend on them.",
            UserWarning,
            stacklevel=2,
        )


def _listed(parts: list[str]) -> str:
    more = f"; and {len(parts) - _MOST_NAMED} more" if len(parts) > _MOST_NAMED else ""
    return "; ".join(parts[:_MOST_NAMED]) + more


def _same_predictions(given: Given, whole: Any, layers: str, inputs: Mapping[str, Any]) -> Tensor:
    """Returns the copy's predictions, which are the model's."""
    model, pruned = given.model, whole.get_submodule(given.path)
    wanted = as_logits(_predicted(given, given.whole, inputs), 1)
    with (
        _noting(model.get_submodule(layers)) as strange,
        _noting(pruned.get_submodule(layers)) as own,
    ):
        found = as_logits(given.predict(whole, Entries(inputs)), 1)
    if strange or not own:
        where = "predict" if given.is_own else f"the forward of this {type(model).__name__}"
        raise ValueError(
            f"{where} runs {'the layers of the original model' if strange else 'none of the layers'} "
            "when it is called with a copy of the model. It must refer to the model by its argument "
            "(model or self), not by the name of the original."
        )
    if not _alike(found, wanted, _tolerance(wanted, model)):
        difference = float((found.cpu().double() - wanted.cpu().double()).abs().max())
        raise ValueError(
            f"A copy of this {type(given.whole).__name__} predicts something else than the model: "
            f"logits differ by {difference:.3g}, where the largest is "
            f"{float(wanted.abs().max()):.3g}. A part of the model is random in evaluation mode, or "
            "depends on something that is not part of the model. Remove it, or pass predict=."
        )
    return found


def _predicted(given: Given, whole: Any, inputs: Mapping[str, Any]) -> Any:
    try:
        return given.predict(whole, Entries(inputs))
    except (AttributeError, TypeError, KeyError) as error:
        stock = stock_class(type(given.model))
        if given.is_own or given.task is None or is_stock(type(given.model)):
            raise
        raise ValueError(
            f"The predictions of this {type(given.model).__name__} cannot be computed as those of a "
            f"{stock.__bases__[1].__name__} ({type(error).__name__}: {error}). Pass predict=, a "
            "function (model, batch) -> logits."
        ) from error


def _tried(predict: Predict, whole: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    try:
        return as_logits(predict(whole, Entries(inputs)), 1)
    except Exception:  # of any kind: the stock class cannot do what the user's can
        return None


@contextmanager
def _noting(layers: nn.Module) -> Iterator[list[nn.Module]]:
    """Records which transformer layers are run."""
    ran: list[nn.Module] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, _: ran.append(module))
        for layer in layers.children()
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _tolerance(logits: Tensor, model: Any) -> float:
    """Relative difference that kernels may make; large where accelerate runs the model in autocast."""
    exact = torch.bfloat16 if "_original_forward" in vars(model) else logits.dtype
    return float(torch.finfo(exact).eps ** 0.5) if exact.is_floating_point else 0.0


def _alike(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.cpu().double(), other.cpu().double()
    same = (one == other) | (one.isnan() & other.isnan())
    counted = other.isfinite() & (other.abs() < torch.finfo(torch.float16).max * 1e6)
    size = float(other[counted].abs().max()) if bool(counted.any()) else 0.0
    return bool((same | ((one - other).abs() <= tolerance * size)).all())
