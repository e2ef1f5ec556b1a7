"""What a user gives to be pruned: a model, or an object with a model inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures.row import Architecture
from ..architectures.table import ROWS, find_architecture
from ..architectures.tasks import Predict, ProblemType, Task, problem_type
from ..calibration.state_memory import batch_tokens_on
from ..model_layers.device_map import input_device
from ..modeling.classes import model_task, stock_class
from .config import KPruneConfig


@dataclass(frozen=True)
class Given:
    """A model to prune, and the object that it was given in.

    Attributes:
        whole: The object: the model itself, or a module with the model inside.
        path: Path of the model in it, empty if it is the model.
        predict: Computes the predictions, `(whole, batch) -> logits`.
        problem: Problem type of these logits.
        task: Task of the model; None for a class of which only `predict` knows the predictions.
        is_own: Whether `predict` is the user's.
    """

    whole: nn.Module
    path: str
    predict: Predict
    problem: ProblemType
    task: Task | None
    is_own: bool

    @property
    def model(self) -> PreTrainedModel:
        """The model to prune."""
        found: Any = self.whole.get_submodule(self.path)
        return found

    @property
    def architecture(self) -> Architecture:
        """Table row of the model's family."""
        return find_architecture(self.model)

    @property
    def predicts_next_tokens(self) -> bool:
        """Whether it is a causal language model, judged by all of its next tokens."""
        return self.task is not None and self.task.is_causal and not self.is_own

    @property
    def predicts_spans(self) -> bool:
        """Whether it answers questions by a first and a last token."""
        return self.task is not None and self.task.is_span and not self.is_own

    def options(self, config: KPruneConfig) -> KPruneConfig:
        """Returns the options, with the model's defaults in place of those that are None."""
        return config.meant_for(
            is_causal=self.architecture.is_causal,
            next_tokens=self.predicts_next_tokens,
            spans=self.predicts_spans,
            batch_tokens=batch_tokens_on(input_device(self.model), self.model),
        )

    def predict_with(self, whole: nn.Module) -> Predict:
        """Returns the predictions as a function of the model inside a copy of the given object."""
        if not self.path:
            return self.predict
        return lambda model, batch: self.predict(whole, batch)


def given_model(model: Any, predict: Predict | None) -> Given:
    """Finds the model to prune.

    Args:
        model: What the user gave, without the wrappers of an accelerator.
        predict: The user's function for its predictions, or None.

    Raises:
        ValueError: If it has no model that can be pruned, or if its predictions are unknown.
    """
    model = getattr(model, "_orig_mod", model)  # compiled by torch.compile
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise ValueError(
                f"{name} is compiled by torch.compile, which hides the layers. Prune the model before "
                "it is compiled, then compile the result."
            )
    if _is_prunable_itself(model) or is_from(model, "peft"):
        return _plain(model, predict)
    path = _path_inside(model)
    inner: Any = model.get_submodule(path)
    if predict is not None:
        return _given(model, path, predict, "single_label_classification", None, True)
    if is_from(model, "sentence_transformers"):
        task = model_task(inner)
        if task.name == "embeddings":
            return _given(model, path, _sentence_embedding, "regression", None, False)

        def predict_inside(whole: Any, batch: Mapping[str, Tensor]) -> Tensor:
            return task.predict(whole.get_submodule(path), batch)

        return _given(model, path, predict_inside, problem_type(inner, task), task, False)
    raise ValueError(
        f"Cannot tell what a {type(model).__name__} predicts, which has a {type(inner).__name__} "
        f"inside at {path!r}. Pass predict=, a function (model, batch) -> logits that is called with "
        f"the {type(model).__name__}; the result is one, too. Or prune the part alone: "
        f"model.{path} = kprune(model.{path}, dataloader)."
    )


def _given(
    model: nn.Module,
    path: str,
    predict: Predict,
    problem: ProblemType,
    task: Task | None,
    is_own: bool,
) -> Given:
    find_architecture(model.get_submodule(path))
    return Given(model, path, predict, problem, task, is_own)


def _plain(model: Any, predict: Predict | None) -> Given:
    find_architecture(model)
    if predict is not None:
        task = model_task(model) if stock_class(type(model)) is not None else None
        return Given(model, "", predict, "single_label_classification", task, True)
    task = model_task(model)
    return Given(model, "", task.predict, problem_type(model, task), task, False)


def with_problem(given: Given, problem: ProblemType | None) -> Given:
    """Returns it with another problem type, unless that is None."""
    return given if problem is None else replace(given, problem=problem)


def _is_prunable_itself(model: nn.Module) -> bool:
    """Whether the layers are where those of its family are, not in a model inside."""
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in ROWS:
        return False
    return model.base_model is not model or stock_class(type(model)) is not None


def _path_inside(whole: nn.Module) -> str:
    """Returns the path of the only model of transformers inside a module."""
    inside = [
        name
        for name, module in whole.named_modules()
        if module is not whole and isinstance(module, PreTrainedModel)
    ]
    if isinstance(whole, PreTrainedModel):
        inside = [name for name in inside if _is_prunable_itself(whole.get_submodule(name))]
    outer = [name for name in inside if not any(name.startswith(f"{o}.") for o in inside)]
    if not outer:
        find_architecture(whole)  # says which are supported
        raise ValueError(
            f"Cannot prune a {type(whole).__name__}: the encoder is not where those of its family "
            "have it. Assign it to an attribute named like base_model_prefix."
        )
    if len(outer) > 1:
        raise ValueError(
            f"A {type(whole).__name__} has several models inside, at {', '.join(map(repr, outer))}. "
            f"Prune one after the other, with predict= for its own outputs: model.{outer[0]} = "
            f"kprune(model.{outer[0]}, dataloader, predict=...)."
        )
    return outer[0]


def _sentence_embedding(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    embedding: Tensor = model(dict(batch))["sentence_embedding"]
    return embedding


def is_from(model: nn.Module, package: str) -> bool:
    """Whether a class of a model comes from a package."""
    return any(kind.__module__.partition(".")[0] == package for kind in type(model).__mro__)


def require_module(model: Any) -> None:
    """Refuses what is not a module, such as a pipeline or the name of a model.

    Raises:
        TypeError: If the object is not a module.
    """
    if isinstance(model, nn.Module):
        return
    hint = "."
    for name in ("model", "module"):
        if isinstance(getattr(model, name, None), nn.Module):
            hint = f": here its attribute {name!r}. Put the result back there."
    raise TypeError(
        f"Cannot prune a {type(model).__module__}.{type(model).__qualname__}. Pass a model of "
        f"transformers, or a module with one inside{hint}"
    )


def given_config(config: Any, reduction: float | None) -> KPruneConfig:
    """Returns the options of a run.

    Args:
        config: A `KPruneConfig`, or None.
        reduction: The option of that name, instead of a config; None for the default.

    Raises:
        TypeError: If the config is something else.
        ValueError: If there are both.
    """
    if reduction is not None and config is not None:
        raise ValueError(
            "Both a config and reduction= were passed. Set it in the config: KPruneConfig(reduction="
            f"{reduction!r}, ...)."
        )
    if config is None:
        return KPruneConfig() if reduction is None else KPruneConfig(reduction=reduction)
    if not isinstance(config, KPruneConfig):
        advice = f"reduction={config!r}" if isinstance(config, float) else "KPruneConfig(...)"
        raise TypeError(
            f"The config is a {type(config).__name__}, not a KPruneConfig. Pass kprune(model, data, "
            f"{advice})."
        )
    return config
