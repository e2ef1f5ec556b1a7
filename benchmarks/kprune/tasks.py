"""The tasks of the K-prune benchmarks: data, targets and metrics.

Data are JSON Lines in a folder for each data set, `DATA/sst2/train.jsonl` and so on.
"""

from __future__ import annotations

import collections
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from kprune_ext.evaluation import metrics

from ..common.corpora import read_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A data set, how a model learns it, and how its predictions are measured.

    `target` maps rows and their tokens to labels, `metrics` maps predictions and rows to named
    numbers in percent, and `main` is the metric that studies report.
    """

    fields: tuple[str, ...]
    auto: Any
    labels: int
    target: Callable[[list[Row], Any], dict[str, Tensor]]
    metrics: Callable[[list[Any], list[Row]], dict[str, float]]
    main: str
    max_length: int = 128
    rate: float = 1e-4
    epochs: int = 3


def _classes(rows: list[Row], encoded: Any) -> dict[str, Tensor]:
    return {"labels": torch.tensor([row["label"] for row in rows])}


def _scores(rows: list[Row], encoded: Any) -> dict[str, Tensor]:
    return {"labels": torch.tensor([float(row["score"]) for row in rows])}


def _spans(rows: list[Row], encoded: Any) -> dict[str, Tensor]:
    """The first and last token of each answer; the first token where truncation has cut it off."""
    starts, ends = [], []
    for number, row in enumerate(rows):
        begin = row["answers"]["answer_start"][0]
        end = begin + len(row["answers"]["text"][0])
        offsets, parts = encoded["offset_mapping"][number], encoded.sequence_ids(number)
        inside = [
            token
            for token, (a, b) in enumerate(offsets)
            if parts[token] == 1 and int(a) < end and int(b) > begin
        ]
        whole = inside and int(offsets[inside[-1]][1]) >= end
        starts.append(inside[0] if whole else 0)
        ends.append(inside[-1] if whole else 0)
    return {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}


def accuracy_and_f1(predictions: list[Any], rows: list[Row]) -> dict[str, float]:
    """Accuracy, and F1 of class 1."""
    found = torch.stack([p.argmax() for p in predictions])
    wanted = torch.tensor([row["label"] for row in rows])
    return {
        "accuracy": 100 * metrics.accuracy(found, wanted),
        "f1": 100 * metrics.binary_f1(found, wanted),
    }


def spearman(predictions: list[Any], rows: list[Row]) -> dict[str, float]:
    """Spearman's rank correlation with the scores."""
    found = torch.stack([p.reshape(()) for p in predictions])
    wanted = torch.tensor([float(row["score"]) for row in rows])
    return {"spearman": 100 * metrics.spearman(found, wanted)}


def answer_scores(predictions: list[Any], rows: list[Row]) -> dict[str, float]:
    """F1 of the words of predicted answers, and exact matches, as in SQuAD."""
    exact = f1 = 0.0
    for found, row in zip(predictions, rows, strict=True):
        words = _words(found)
        scores = []
        for wanted in map(_words, row["answers"]["text"]):
            common = sum((collections.Counter(words) & collections.Counter(wanted)).values())
            scores.append((2 * common / max(1, len(words) + len(wanted)), words == wanted))
        f1 += max(score for score, _ in scores)
        exact += max(same for _, same in scores)
    return {"f1": 100 * f1 / len(rows), "exact_match": 100 * exact / len(rows)}


def _words(text: str) -> list[str]:
    """The words in lower case, without punctuation and articles, as SQuAD's metric takes them."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


TASKS = {
    "sst2": Task(
        ("sentence",), AutoModelForSequenceClassification, 2, _classes, accuracy_and_f1, "accuracy"
    ),
    "mrpc": Task(
        ("sentence1", "sentence2"),
        AutoModelForSequenceClassification,
        2,
        _classes,
        accuracy_and_f1,
        "f1",
        epochs=5,
    ),
    "stsb": Task(
        ("sentence1", "sentence2"),
        AutoModelForSequenceClassification,
        1,
        _scores,
        spearman,
        "spearman",
    ),
    "squad": Task(
        ("question", "context"),
        AutoModelForQuestionAnswering,
        2,
        _spans,
        answer_scores,
        "f1",
        max_length=256,
    ),
}


def read(data: Path, name: str, split: str, limit: int | None = None) -> list[Row]:
    """The rows of a split; those of the validation set where there is no test set."""
    path = data / name / f"{split}.jsonl"
    if split == "test" and not path.exists():
        path = data / name / "validation.jsonl"
    return list(read_rows(path))[:limit]


def letters(task: Task, row: Row) -> int:
    """The length of a row's texts."""
    return sum(len(row[field]) for field in task.fields)


def encode(task: Task, tokenizer: Any, rows: list[Row], *, offsets: bool = False) -> Any:
    """Rows as one padded batch of tokens."""
    texts = [[row[field] for row in rows] for field in task.fields]
    truncation = "only_second" if task.metrics is answer_scores else "longest_first"
    return tokenizer(
        *texts,
        truncation=truncation,
        max_length=min(task.max_length, tokenizer.model_max_length),
        padding=True,
        return_tensors="pt",
        return_offsets_mapping=offsets,
    )


def calibration(
    task: Task, tokenizer: Any, rows: list[Row], seed: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of inputs without labels, in an order that the seed determines."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for start in range(0, len(order), 32):
        part = [rows[number] for number in order[start : start + 32]]
        yield dict(encode(task, tokenizer, part))
