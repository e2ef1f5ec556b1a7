"""The texts of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.common import corpora


def test_questions_are_read_with_their_first_answers(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": "Who?", "answer": ["I", "you"]}, {"question": "Why?", "answer": "So."}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert corpora.read_examples(path)[0] == ("Question: Who?\nAnswer:", " I")
    wanted = "Question: Who?\nAnswer: I\n\nQuestion: Why?\nAnswer: So."
    assert corpora.read_corpus(path) == wanted
    plain = tmp_path / "text.txt"
    plain.write_text(wanted)
    assert corpora.read_corpus(plain) == wanted


def test_only_completions_are_learned(tiny_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (row,) = corpora.encode([("Question: Who?\nAnswer:", " I")], tokenizer)
    learned = [
        token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label > 0
    ]
    assert tokenizer.decode(learned).split() == ["I", tokenizer.eos_token]
    assert len(row["input_ids"]) > len(learned)


def test_windows_are_drawn_once_and_must_be_enough() -> None:
    windows = torch.arange(12).view(6, 2)
    assert sorted(corpora.drawn(windows, 6, seed=0)[:, 0].tolist()) == [0, 2, 4, 6, 8, 10]
    assert corpora.spread(windows, 3)[:, 0].tolist() == [0, 4, 8]
    with pytest.raises(SystemExit, match="There are 6 windows .*; 7 were asked for"):
        corpora.spread(windows, 7)


def test_there_is_text_without_a_download() -> None:
    sentences = corpora.short_sentences(256)
    assert len(set(sentences)) == 256
    assert len("\n".join(corpora.manual())) > 100_000
