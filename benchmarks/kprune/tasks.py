"""The tasks of the K-prune benchmark: data, fine-tuning with a fixed recipe, and metrics.

Data are JSON Lines in a folder for each data set, `DATA/sst2/train.jsonl` and so on.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from study import RESULTS
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
    set_seed,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A data set and what is made of it; `metrics` maps predictions and rows to named numbers."""

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
    """First and last token of the answer; the first token where truncation cut it off."""
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


def _accuracy_f1(predictions: list[Any], rows: list[Row]) -> dict[str, float]:
    pairs = [(int(p.argmax()), row["label"]) for p, row in zip(predictions, rows, strict=True)]
    counts = collections.Counter(pairs)
    wrong = counts[1, 0] + counts[0, 1]
    f1 = 2 * counts[1, 1] / max(1, 2 * counts[1, 1] + wrong)
    return {"accuracy": 100 * sum(a == b for a, b in pairs) / len(pairs), "f1": 100 * f1}


def _spearman(predictions: list[Any], rows: list[Row]) -> dict[str, float]:
    found = torch.stack([p.reshape(()) for p in predictions]).double()
    ranks = [_ranks(found), _ranks(torch.tensor([float(row["score"]) for row in rows]))]
    return {"spearman": 100 * float(torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num())}


def _ranks(values: Tensor) -> Tensor:
    """Ranks, ties sharing the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def _answers(predictions: list[Any], rows: list[Row]) -> dict[str, float]:
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
    """Words in lower case without punctuation and articles, as SQuAD's metric takes them."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


TASKS = {
    "sst2": Task(
        ("sentence",), AutoModelForSequenceClassification, 2, _classes, _accuracy_f1, "accuracy"
    ),
    "mrpc": Task(
        ("sentence1", "sentence2"),
        AutoModelForSequenceClassification,
        2,
        _classes,
        _accuracy_f1,
        "f1",
        epochs=5,
    ),
    "stsb": Task(
        ("sentence1", "sentence2"),
        AutoModelForSequenceClassification,
        1,
        _scores,
        _spearman,
        "spearman",
    ),
    "squad": Task(
        ("question", "context"),
        AutoModelForQuestionAnswering,
        2,
        _spans,
        _answers,
        "f1",
        max_length=256,
    ),
}


def common_parser(about: str) -> argparse.ArgumentParser:
    """What all studies of fine-tuned models ask for."""
    parser = argparse.ArgumentParser(
        description=about.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the data sets")
    add("--checkpoints", type=Path, required=True, help="for fine-tuned models")
    add("--model", help="by default MiniLM-L6 from its package")
    add("--epochs", type=int, help="of fine-tuning the dense model, in place of the recipe's")
    add("--limit", type=int, help="rows of each split, for a trial")
    add("--threads", type=int, default=1)
    add("--results", type=Path, default=RESULTS)
    return parser


def read(data: Path, name: str, split: str, limit: int | None = None) -> list[Row]:
    """The rows of a split; the validation set where there is no test set."""
    path = data / name / f"{split}.jsonl"
    if split == "test" and not path.exists():
        path = data / name / "validation.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:limit]


def encode(task: Task, tokenizer: Any, rows: list[Row], *, offsets: bool = False) -> Any:
    texts = [[row[field] for row in rows] for field in task.fields]
    truncation = "only_second" if task.metrics is _answers else "longest_first"
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
    """Inputs without labels, in an order that the seed gives."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for start in range(0, len(order), 32):
        part = [rows[number] for number in order[start : start + 32]]
        yield dict(encode(task, tokenizer, part))


def fine_tune(
    task: Task, tokenizer: Any, source: str, rows: list[Row], epochs: int | None = None
) -> PreTrainedModel:
    """The recipe of the dense models: every weight is trained, in float32, with seed 0."""
    set_seed(0)
    model = task.auto.from_pretrained(source, num_labels=task.labels)
    train(task, tokenizer, model, rows, rate=task.rate, epochs=epochs or task.epochs, seed=0)
    return model


def train(
    task: Task,
    tokenizer: Any,
    model: torch.nn.Module,
    rows: list[Row],
    *,
    rate: float,
    epochs: int,
    seed: int,
    batch: int = 32,
) -> None:
    """Batches of like length, AdamW with a linear schedule after a tenth of warming up."""
    steps = epochs * -(-len(rows) // batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    shuffler = random.Random(seed)
    model.train()
    for epoch in range(epochs):
        for part in _batches_of_like_length(task, rows, shuffler, batch):
            encoded = encode(task, tokenizer, part, offsets=True)
            targets = task.target(part, encoded)
            encoded.pop("offset_mapping")
            model(**encoded, **targets).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1} of {epochs} done", flush=True)
    model.eval()


def _batches_of_like_length(
    task: Task, rows: list[Row], shuffler: random.Random, batch: int
) -> list[list[Row]]:
    """Sorted within 1,600 rows in random order, so that little is padded; batches in random order."""
    order = shuffler.sample(rows, len(rows))
    batches = []
    for start in range(0, len(order), 1600):
        part = sorted(order[start : start + 1600], key=lambda row: _letters(task, row))
        batches += [part[first : first + batch] for first in range(0, len(part), batch)]
    shuffler.shuffle(batches)
    return batches


def _letters(task: Task, row: Row) -> int:
    return sum(len(row[field]) for field in task.fields)


@torch.no_grad()
def evaluate(
    task: Task, tokenizer: Any, model: PreTrainedModel, rows: list[Row]
) -> dict[str, float]:
    """The task's metrics, in percent."""
    rows = sorted(rows, key=lambda row: _letters(task, row))
    predictions: list[Any] = []
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        encoded = encode(task, tokenizer, part, offsets=True)
        offsets = encoded.pop("offset_mapping")
        output = model(**encoded)
        if task.metrics is _answers:
            predictions += _texts(output, encoded, offsets, part)
        else:
            predictions += list(output.logits)
    return task.metrics(predictions, rows)


def _texts(output: Any, encoded: Any, offsets: Tensor, rows: list[Row]) -> list[str]:
    """The likeliest span of at most 30 tokens inside each context, as text."""
    found = []
    for number, row in enumerate(rows):
        inside = torch.tensor([part == 1 for part in encoded.sequence_ids(number)])
        start = output.start_logits[number].masked_fill(~inside, -torch.inf)
        end = output.end_logits[number].masked_fill(~inside, -torch.inf)
        spans = (start.unsqueeze(1) + end.unsqueeze(0)).triu().tril(29)
        allowed = torch.ones_like(spans).triu().tril(29).bool()
        best = int(spans.masked_fill(~allowed, -torch.inf).argmax())
        first, last = divmod(best, len(end))
        found.append(row["context"][int(offsets[number, first, 0]) : int(offsets[number, last, 1])])
    return found
