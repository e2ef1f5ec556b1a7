"""The classifier example runs on a user's own model and file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import docstring_sentences
import kprune_classifier
import pytest
from transformers import AutoModelForSequenceClassification, BertTokenizerFast

from tests.helpers.kprune import tiny_bert

WORDS = [f"word{number}" for number in range(55)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_bert(neurons=200).save_pretrained(folder)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(vocabulary), vocab_file=str(vocabulary)).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"left": WORDS[i % 50], "right": f"{WORDS[i % 7]} {WORDS[i % 11]}", "kind": "abc"[i % 3]}
        for i in range(90)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def command(model: Path, data: Path, tmp_path: Path, monkeypatch) -> list[str]:
    arguments = ["kprune_classifier.py", "--model", str(model), "--data", str(data)]
    arguments += ["--text-columns", "left", "right", "--label-column", "kind", "--max-length", "16"]
    arguments += ["--steps", "2", "--adapter-steps", "2", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    return arguments


def test_a_users_model_and_file(command, tmp_path, capsys) -> None:
    kprune_classifier.main()
    printed = capsys.readouterr().out
    assert printed.count("reloaded, same logits: True") == 2
    assert "pruned 80% + lora" in printed
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "pruned-0.8")
    assert saved.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_failed_reload_check_is_a_failed_run(command, monkeypatch) -> None:
    command += ["--adapter", "none", "--reductions", "0.5"]
    monkeypatch.setattr(kprune_classifier, "same_after_reload", lambda *_: False)
    with pytest.raises(SystemExit, match=r"gave other logits: .*pruned-0\.5"):
        kprune_classifier.main()


def test_missing_columns_are_named(command) -> None:
    command[command.index("kind")] = "stars"
    with pytest.raises(SystemExit, match=r"no column stars; they have left, right, kind"):
        kprune_classifier.main()


def test_sentences_are_cleaned() -> None:
    clean = docstring_sentences.clean
    raw = "Return a new :class:`numpy.ndarray` of  the `dtype` that was given."
    assert clean(raw, r"numpy") == "Return a new ndarray of the dtype that was given"
    assert clean("Too short.", "numpy") is None
    assert clean(">>> a = f(x) + {1: 2} == [3, 4, 5] # code, no prose", "numpy") is None


def test_sentences_are_balanced_unique_and_the_same_every_time(monkeypatch) -> None:
    chosen = {name: docstring_sentences.LIBRARIES[name] for name in ("pandas", "standard library")}
    monkeypatch.setattr(docstring_sentences, "LIBRARIES", chosen)
    sizes = {"train": 60, "validation": 10, "test": 20}
    data = docstring_sentences.build(**sizes, least=50)
    assert list(data) == ["train", "validation", "test"]
    sentences = []
    for split, rows in data.items():
        labels = rows["label"]
        assert labels.count(0) == labels.count(1) > 0.8 * sizes[split]
        sentences += [sentence.lower() for sentence in rows["sentence"]]
    assert len(set(sentences)) == len(sentences)
    assert not any("pandas" in row["sentence"].lower() for row in data["train"] if not row["label"])
    again = docstring_sentences.build(**sizes, least=50)
    assert all(list(again[split]) == list(data[split]) for split in data)
