"""Texts to calibrate on, to train on and to measure with, as tokens."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sized
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Example = tuple[str, str]  # a prompt and its completion
Encoded = list[dict[str, list[int]]]


def manual() -> list[str]:
    """The paragraphs of prose in Python's language manual, which every Python brings along."""
    blocks = (
        " ".join(block.split()) for name in sorted(topics) for block in topics[name].split("\n\n")
    )
    prose = (text for text in blocks if len(text) >= 200 and text.endswith("."))
    return list(dict.fromkeys(text for text in prose if "::=" not in text))


def short_sentences(count: int) -> list[str]:
    """The first sentences of paragraphs of Python's manual, of varying length."""
    firsts = dict.fromkeys(re.split(r"(?<=[a-z)])\.\s", text)[0] for text in manual())
    _check_enough(firsts, count, "sentences in Python's manual")
    return list(firsts)[:count]


def read_examples(path: Path) -> list[Example]:
    """The questions of a JSON Lines file as prompts, each with its (first) answer; or tasks and code."""
    return [
        (f"Question: {row['question']}\nAnswer:", f" {_first(row['answer'])}")
        if "question" in row
        else (f"{row['text']}\n", "\n".join(row["code"].split("\r\n")))
        for row in read_rows(path)
    ]


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _first(answer: str | list[str]) -> str:
    return answer if isinstance(answer, str) else answer[0]


def read_corpus(path: Path) -> str:
    """The text of a plain file, or the questions and first answers of a JSON Lines file."""
    if path.suffix != ".jsonl":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(prompt + completion for prompt, completion in read_examples(path))


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokens with labels; only the completions are learned and measured."""
    rows = []
    for prompt, completion in examples:
        before = tokenizer(prompt).input_ids
        after = tokenizer(completion + tokenizer.eos_token, add_special_tokens=False).input_ids
        ids, labels = before + after, [-100] * len(before) + after
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def cut(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """The text as windows `(windows, length)` of tokens, without overlap; the rest is left out."""
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    return ids[: len(ids) // length * length].view(-1, length)


def drawn(windows: Tensor, count: int, seed: int) -> Tensor:
    """`count` windows chosen at random, none of them twice."""
    _check_enough(windows, count, "windows of this length in the corpus")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


def spread(windows: Tensor, count: int) -> Tensor:
    """`count` windows at even distances, so that they come from all over the text."""
    _check_enough(windows, count, "windows of this length in the corpus")
    return windows[torch.arange(count) * len(windows) // count]


def _check_enough(found: Sized, count: int, what: str) -> None:
    """End the program with a message where there is less than was asked for."""
    if len(found) < count:
        sys.exit(f"There are {len(found)} {what}; {count} were asked for.")
