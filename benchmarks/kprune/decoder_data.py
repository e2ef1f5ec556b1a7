"""Texts of the decoder study: what to calibrate on, and what to score.

Files in the data folder: `wikitext2/train.txt`, `wikitext2/test.txt`, `c4_sample/train.jsonl` (`text`),
`nq_open/train.jsonl`, `nq_open/validation.jsonl`, `gsm8k/train.jsonl`, `gsm8k/test.jsonl` (`question`,
`answer`). Running text comes in windows of one length without overlap, each beginning with the
tokenizer's first token where it has one. Of C4, the last third is held out for scoring.

A question is the prompt, in the model's chat template (`chat`) or as `Question: …` and `Answer:`
(`plain`), and its first answer follows; only the answer counts, by labels of -100 on all else.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..common.corpora import read_rows

Format = Literal["plain", "chat"]
Sample = tuple[list[int], list[int]]  # tokens, and labels of -100 where nothing counts
#: Parts of each calibration set, as shares of its tokens.
CALIBRATIONS = {
    "wikitext2": {"wikitext2": 1.0},
    "c4": {"c4": 1.0},
    "mixture": {"wikitext2": 0.5, "nq_open": 0.25, "gsm8k": 0.25},
    "mixture_c4": {"c4": 0.5, "nq_open": 0.25, "gsm8k": 0.25},
    "questions": {"nq_open": 0.5, "gsm8k": 0.5},
}
QUESTIONS = {"nq_open": "validation", "gsm8k": "test"}  # the split that is scored
IGNORED = -100


@dataclass(frozen=True)
class Texts:
    """Where texts are, and how they become tokens.

    Attributes:
        folder: The data folder.
        tokenizer: The model's tokenizer.
        length: Tokens per window of running text.
        form: Form of the questions.
    """

    folder: Path
    tokenizer: Any
    length: int = 512
    form: Format = "plain"

    def read(self, *names: str) -> Path:
        """The path of a file; the program ends with a message where it is missing."""
        path = self.folder.joinpath(*names)
        if not path.is_file():
            sys.exit(f"There is no file {path}. Pass the folder of the data sets with --data.")
        return path


@cache
def windows(texts: Texts, name: str, split: str) -> Tensor:
    """Running text as windows `(windows, length)` of tokens.

    Args:
        texts: Where the texts are.
        name: `"wikitext2"` or `"c4"`.
        split: `"train"` or `"test"`.
    """
    if name == "wikitext2":
        text = texts.read("wikitext2", f"{split}.txt").read_text(encoding="utf-8")
    else:
        rows = [row["text"] for row in read_rows(texts.read("c4_sample", "train.jsonl"))]
        held_out = len(rows) - len(rows) // 3
        text = "\n\n".join(rows[:held_out] if split == "train" else rows[held_out:])
    ids = torch.tensor(texts.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    first = _first_tokens(texts.tokenizer)
    body = texts.length - len(first)
    found = ids[: len(ids) // body * body].view(-1, body)
    return torch.cat([torch.tensor(first, dtype=ids.dtype).expand(len(found), -1), found], dim=1)


def _first_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text."""
    alone = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    return whole[: len(whole) - len(alone)] if whole[-len(alone) :] == alone else []


@cache
def questions(texts: Texts, name: str, split: str) -> list[dict[str, Any]]:
    """The rows of a set of questions, `question` and `answer`."""
    return list(read_rows(texts.read(name, f"{split}.jsonl")))


def answered(texts: Texts, name: str, split: str, limit: int | None = None) -> list[Sample]:
    """Questions with their first answers, only the answers of which count.

    Args:
        texts: Where the texts are.
        name: `"nq_open"` or `"gsm8k"`.
        split: The split.
        limit: Number of questions from the beginning; None for all.
    """
    rows = questions(texts, name, split)[:limit]
    return [encoded(texts, row) for row in rows]


def encoded(texts: Texts, row: dict[str, Any]) -> Sample:
    """One question and its first answer, without a token that ends it."""
    question, answer = row["question"], row["answer"]
    answer = answer if isinstance(answer, str) else answer[0]
    tokenizer = texts.tokenizer
    if texts.form == "chat":
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        before = tokenizer(prompt, add_special_tokens=False).input_ids
    else:
        before = tokenizer(f"Question: {question}\nAnswer:").input_ids
        answer = f" {answer}"
    after = tokenizer(answer, add_special_tokens=False).input_ids
    return before + after, [IGNORED] * len(before) + after


def calibration(texts: Texts, name: str, tokens: int, seed: int) -> list[Sample]:
    """Samples of at most so many tokens in all, in an order that the seed determines.

    Args:
        texts: Where the texts are.
        name: One of `CALIBRATIONS`.
        tokens: Most tokens.
        seed: Seed of the choice.
    """
    found = []
    for part, share in CALIBRATIONS[name].items():
        rows: Sequence[Any]
        if part in QUESTIONS:
            rows, encode = questions(texts, part, "train"), partial(encoded, texts)
        else:
            rows, encode = windows(texts, part, "train").tolist(), _running
        found += _up_to(rows, encode, int(share * tokens), seed)
    random.Random(seed).shuffle(found)
    return found


def _running(row: list[int]) -> Sample:
    return row, row


def _up_to(
    rows: Sequence[Any], encode: Callable[[Any], Sample], tokens: int, seed: int
) -> list[Sample]:
    """Samples drawn at random until the next one would be too much."""
    found: list[Sample] = []
    count = 0
    for row in random.Random(seed).sample(rows, len(rows)):
        ids, labels = encode(row)
        if count + len(ids) > tokens:
            if not found:
                sys.exit(f"No sample fits into {tokens} tokens; the first has {len(ids)}.")
            break
        count += len(ids)
        found.append((ids, labels))
    return found


def batches_of(
    samples: Sequence[Sample], batch_tokens: int, padding: int
) -> list[dict[str, Tensor]]:
    """Batches of samples of like length, padded on the right.

    Args:
        samples: The samples, in any order.
        batch_tokens: Most tokens per batch, padding included; a longer sample is a batch alone.
        padding: Token to pad with.

    Returns:
        Batches of `input_ids`, `attention_mask` and `labels`, `(batch, tokens)` each.
    """
    found, part = [], []
    for sample in sorted(samples, key=lambda one: len(one[0])):
        if part and (len(part) + 1) * len(sample[0]) > batch_tokens:
            found.append(_padded(part, padding))
            part = []
        part.append(sample)
    return [*found, _padded(part, padding)] if part else found


def _padded(samples: Sequence[Sample], padding: int) -> dict[str, Tensor]:
    ids, labels = ([torch.tensor(values) for values in side] for side in zip(*samples, strict=True))
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
