"""Scores of models in `kprune search` and `kprune sweep`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..common.fingerprints import data_of
from ..common.text_data import load_rows
from ..evaluation import metrics
from ..evaluation.pooling import Pooling, stored_pooling
from ..evaluation.predictions import cosines, embeddings_of, logits_of, perplexity_of
from ..modeling.classes import model_task
from .inputs import Loaded, check_fields, text_fields

if TYPE_CHECKING:
    from .search_options import ScoredOptions

_LABELS = ("label", "labels", "score")
_PAIR = ["sentence1", "sentence2"]


@dataclass(frozen=True)
class Scoring:
    """How models are scored.

    Attributes:
        evaluate: Returns the score of a model.
        about: What the score depends on besides the model, as plain values.
        greater_is_better: Whether a greater score is better.
    """

    evaluate: Callable[[Any], float]
    about: dict[str, Any]
    greater_is_better: bool = True


def rows_to_score(options: ScoredOptions) -> Any:
    """Returns the rows to score on.

    Raises:
        ValueError, OSError: If they cannot be loaded, or an option is out of range.
    """
    if options.eval_rows is not None and options.eval_rows < 1:
        raise ValueError(
            f"eval_rows={options.eval_rows} leaves no row to score on. Pass 1 or more."
        )
    rows = load_rows(options.eval_data, name=options.eval_data_name, split=options.eval_split)
    return (
        rows if options.eval_rows is None else rows.select(range(min(options.eval_rows, len(rows))))
    )


def scoring_for(options: ScoredOptions, loaded: Loaded, rows: Any) -> Scoring:
    """Returns how models are scored by the options.

    Args:
        options: Options of the command.
        loaded: The model and its processor.
        rows: The data to score on.

    Raises:
        ValueError: If the model has no such score, or the data lack what it takes.
    """
    task = model_task(loaded.model).name
    make = _SCORES[options.eval]
    evaluate, own = make(options, loaded, rows, task)
    about = {
        "score": options.eval,
        "data to score on": data_of(rows),
        "way of scoring": own | {"max_length": options.max_length},
    }
    return Scoring(evaluate, about, greater_is_better=options.eval != "perplexity")


Made = tuple[Callable[[Any], float], dict[str, Any]]


def _class_score(options: ScoredOptions, loaded: Loaded, rows: Any, task: str) -> Made:
    classes = loaded.about.num_labels
    if not task.endswith(("sequence classification", "image classification")) or classes < 2:
        raise ValueError(
            f"eval={options.eval} is a score of classifiers of sequences or images, but the model is "
            f"for {task}{' with one label' if classes < 2 else ''}. Pass another score, or as task what "
            "the model is for."
        )
    name = _label_field(options, rows)
    if task == "image classification":
        check_fields(rows, [options.image_field], "image_field", "images")
        fields = [options.image_field]
    else:
        fields = _text_fields(options, rows)
        rows = _by_length(rows, fields)
    rows = _complete(rows, [*fields, name])
    wanted = torch.tensor([_class(value, loaded.about, name) for value in rows[name]])
    own = replace(options, text_field=fields)

    def evaluate(model: PreTrainedModel) -> float:
        predicted = logits_of(model, loaded.batches(rows, own)).argmax(1)
        if options.eval == "accuracy":
            return metrics.accuracy(predicted, wanted)
        score = metrics.binary_f1 if classes == 2 else metrics.macro_f1
        return score(predicted, wanted)

    return evaluate, {"fields": fields, "label_field": name}


def _spearman(options: ScoredOptions, loaded: Loaded, rows: Any, task: str) -> Made:
    regression = task == "sequence classification" and loaded.about.num_labels == 1
    if task != "embeddings" and not regression:
        raise ValueError(
            "eval=spearman is a score of embedders, and of regression models with one output, but the "
            f"model is for {task}. Pass another score, or --task embeddings for the model without its "
            "head."
        )
    name = _label_field(options, rows)
    fields = _text_fields(options, rows) if regression else _pair_fields(options, rows)
    rows = _complete(_by_length(rows, fields) if regression else rows, [*fields, name])
    wanted = torch.tensor([_number(value, name) for value in rows[name]], dtype=torch.float64)
    if regression:
        own = replace(options, text_field=fields)

        def evaluate(model: PreTrainedModel) -> float:
            return metrics.spearman(logits_of(model, loaded.batches(rows, own))[:, 0], wanted)

        return evaluate, {"fields": fields, "label_field": name}
    pooling = options.pooling
    if pooling == "auto":
        pooling = stored_pooling(options.model, options.revision)
    similar = _similarities(options, loaded, [rows[field] for field in fields], pooling)
    return (
        lambda model: metrics.spearman(similar(model), wanted),
        {"fields": fields, "label_field": name, "pooling": pooling},
    )


def _similarities(
    options: ScoredOptions, loaded: Loaded, columns: list[list[str]], pooling: Pooling
) -> Callable[[PreTrainedModel], Tensor]:
    """Returns a function of a model, whose value is the cosine of each pair of two columns' texts."""
    texts = sorted(dict.fromkeys(text for column in columns for text in column), key=len)
    place = {text: number for number, text in enumerate(texts)}
    first, second = (torch.tensor([place[text] for text in column]) for column in columns)
    table, own = Dataset.from_dict({"text": texts}), replace(options, text_field="text")

    def similarities(model: PreTrainedModel) -> Tensor:
        found = embeddings_of(model, loaded.batches(table, own), pooling)
        return cosines(found[first], found[second])

    return similarities


def _perplexity(options: ScoredOptions, loaded: Loaded, rows: Any, task: str) -> Made:
    if not model_task(loaded.model).is_causal:
        raise ValueError(
            f"eval=perplexity is a score of causal language models, but the model is for {task}. Pass "
            "another score, or --task causal-lm."
        )
    fields = _text_fields(options, rows)
    own = replace(options, text_field=fields)
    return (
        lambda model: perplexity_of(model, loaded.batches(rows, own)),
        {"fields": fields},
    )


_SCORES: dict[str, Callable[[Any, Loaded, Any, str], Made]] = {
    "accuracy": _class_score,
    "f1": _class_score,
    "spearman": _spearman,
    "perplexity": _perplexity,
}


def _text_fields(options: ScoredOptions, rows: Any) -> list[str]:
    return text_fields(rows, options, "text_field" if options.eval_field is None else "eval_field")


def _pair_fields(options: ScoredOptions, rows: Any) -> list[str]:
    given = options.text_field if options.eval_field is None else options.eval_field
    if options.eval_field is None and (isinstance(given, str) or len(given) != 2):
        options = replace(options, eval_field=_PAIR)
    names = _text_fields(options, rows)
    if len(names) != 2:
        raise ValueError(
            "An embedder is scored on pairs of texts. Pass the names of two fields as eval_field."
        )
    return names


def _label_field(options: ScoredOptions, rows: Any) -> str:
    known = [name for name in _LABELS if name in rows.column_names]
    name = options.label_field or (known[0] if known else "label")
    if name not in rows.column_names:
        raise ValueError(
            f"The data to score on have no field {name!r} with labels; their fields are "
            f"{', '.join(rows.column_names)}. Pass the right one as label_field."
        )
    return name


def _complete(rows: Any, names: list[str]) -> Any:
    """Returns the rows that have all these fields."""
    table = rows.select_columns(names)
    found = [n for n in range(len(table)) if all(value is not None for value in table[n].values())]
    if not found:
        raise ValueError(
            f"The data to score on have no row with {' and '.join(names)}. Pass other data as eval_data."
        )
    return rows.select(found)


def _by_length(rows: Any, fields: list[str]) -> Any:
    """Returns the rows sorted by the length of their texts, so that batches have little padding."""
    columns = [rows[field] for field in fields]
    lengths = [sum(len(text or "") for text in texts) for texts in zip(*columns, strict=True)]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


def _class(value: Any, about: Any, field: str) -> int:
    """Returns the class that a label names, by its number or by the name that the config has for it."""
    if isinstance(value, str) and value in about.label2id:
        return int(about.label2id[value])
    number = int(value) if isinstance(value, int | float) and value == int(value) else -1
    if not 0 <= number < about.num_labels:
        raise ValueError(
            f"The field {field!r} of the data to score on holds {value!r}, which is no class of the "
            f"model: it has {about.num_labels} ({', '.join(map(str, about.label2id))}). Pass labelled "
            "data, whose labels are these names or numbers from 0."
        )
    return number


def _number(value: Any, field: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"The field {field!r} of the data to score on holds {value!r}, not a number. Pass the field "
            "with the scores as label_field."
        ) from None
