"""Prompts with their completions: the default knowledge and task, or a user's own data set."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import local_text
from datasets import load_dataset

Example = tuple[str, str]  # prompt, completion; only the completion is learned and measured


@dataclass
class Split:
    train: list[Example]
    test: list[Example]


def as_prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def read_examples(source: str, name: str | None, test_share: float = 0.2) -> Split:
    """Examples from a hub id or a file: columns `question` and `answer`, `prompt` and `completion`,
    or `text`. A split named test is used as such, else the last `test_share` of the rows."""
    suffix = Path(source).suffix.lstrip(".")
    if suffix in {"json", "jsonl", "csv", "parquet", "txt"}:
        kind = {"jsonl": "json", "txt": "text"}.get(suffix, suffix)
        splits = load_dataset(kind, data_files=source)
    else:
        splits = load_dataset(source, name)

    def examples(rows) -> list[Example]:
        columns = rows.column_names
        if {"question", "answer"} <= set(columns):
            return [(as_prompt(r["question"]), " " + _first(r["answer"])) for r in rows]
        if {"prompt", "completion"} <= set(columns):
            return [(r["prompt"], r["completion"]) for r in rows]
        if "text" in columns:
            return [("", r["text"]) for r in rows if r["text"].strip()]
        sys.exit(
            f"{source} has columns {columns}; need question/answer, prompt/completion or text."
        )

    train = examples(splits["train"])
    if "test" in splits:
        return Split(train, examples(splits["test"]))
    held_out = max(1, int(len(train) * test_share))
    return Split(train[:-held_out], train[-held_out:])


def _first(answer: str | list[str]) -> str:
    return answer if isinstance(answer, str) else answer[0]


def default_knowledge() -> Split:
    """Running English and plain statements of facts, half and half."""
    english = local_text.manual()[:128]
    statements = [answer for _, answer in local_text.facts()][:128]
    texts = [("", text) for pair in zip(english, statements, strict=True) for text in pair]
    return Split(texts[:192], texts[192:])


def default_task() -> Split:
    def problems(count: int, seed: int) -> list[Example]:
        return [(as_prompt(q), " " + a) for q, a in local_text.word_problems(count, seed)]

    return Split(problems(1024, seed=1), problems(96, seed=2))
