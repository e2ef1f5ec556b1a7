"""Fine-tuning the dense models with a fixed recipe, and measuring any model on a task."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
    set_seed,
)

from ..common.command_line import add_results, add_threads, make_parser
from ..common.models import encoder_source
from .tasks import TASKS, Row, Task, answer_scores, encode, letters, read


def common_parser(about: str | None) -> argparse.ArgumentParser:
    """A parser with what all studies of fine-tuned models ask for."""
    parser = make_parser(about)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="Folder of the data sets.")
    add("--checkpoints", type=Path, required=True, help="Folder for fine-tuned models.")
    add(
        "--model", help="Hub id or local path of an encoder; by default MiniLM-L6 from its package."
    )
    add("--epochs", type=int, help="Epochs of fine-tuning; by default the recipe's.")
    add("--limit", type=int, help="Number of rows to use of each split, for a trial.")
    add_threads(parser, 1)
    add_results(parser)
    return parser


def dense_model(name: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """The model fine-tuned on a task, and its tokenizer; they are made if they do not exist yet."""
    folder = args.checkpoints / name
    if not (folder / "config.json").exists():
        print(f"Fine-tuning on {name}", flush=True)
        source = encoder_source(args.model)
        tokenizer = AutoTokenizer.from_pretrained(source)
        rows = read(args.data, name, "train", args.limit)
        model = fine_tune(TASKS[name], tokenizer, source, rows, args.epochs)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return TASKS[name].auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def fine_tune(
    task: Task, tokenizer: Any, source: str, rows: list[Row], epochs: int | None = None
) -> PreTrainedModel:
    """The recipe of the dense models: all weights are trained, in float32, with seed 0."""
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
    """Train by AdamW, with a linear schedule after a tenth of warming up, on batches of like length."""
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
    """All rows as batches in random order.

    Rows are sorted by length within 1,600 rows in random order, so that there is little padding.
    """
    order = shuffler.sample(rows, len(rows))
    batches = []
    for start in range(0, len(order), 1600):
        part = sorted(order[start : start + 1600], key=lambda row: letters(task, row))
        batches += [part[first : first + batch] for first in range(0, len(part), batch)]
    shuffler.shuffle(batches)
    return batches


@torch.no_grad()
def evaluate(
    task: Task, tokenizer: Any, model: PreTrainedModel, rows: list[Row]
) -> dict[str, float]:
    """The task's metrics, in percent."""
    rows = sorted(rows, key=lambda row: letters(task, row))
    predictions: list[Any] = []
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        encoded = encode(task, tokenizer, part, offsets=True)
        offsets = encoded.pop("offset_mapping")
        output = model(**encoded)
        if task.metrics is answer_scores:
            predictions += _texts(output, encoded, offsets, part)
        else:
            predictions += list(output.logits)
    return task.metrics(predictions, rows)


def _texts(output: Any, encoded: Any, offsets: Tensor, rows: list[Row]) -> list[str]:
    """The text of the likeliest span of at most 30 tokens inside each context."""
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
