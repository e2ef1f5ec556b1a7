"""Tiny data sets and a tiny encoder for the benchmarks of K-prune and of encoders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from benchmarks.kprune.tasks import TASKS
from tests.helpers.kprune import VOCABULARY, word_tokenizer


def sentence(generator: torch.Generator) -> str:
    return " ".join(f"word{n}" for n in torch.randint(0, 50, (6,), generator=generator))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four data sets in the benchmark's format, and a tiny model with its tokenizer."""
    generator = torch.Generator().manual_seed(0)
    for name in TASKS:
        for split, count in (("train", 40), ("validation", 12), ("test", 12)):
            if (name, split) == ("squad", "test"):
                continue
            rows = []
            for number in range(count):
                pair = [sentence(generator), sentence(generator)]
                rows.append(
                    {
                        "sst2": {"sentence": pair[0], "label": number % 2},
                        "mrpc": {
                            "sentence1": pair[0],
                            "sentence2": pair[1],
                            "label": number % 2,
                        },
                        "stsb": {
                            "sentence1": pair[0],
                            "sentence2": pair[1],
                            "score": number % 6,
                        },
                        "squad": {
                            "question": pair[0],
                            "context": pair[1],
                            "answers": {"text": [pair[1].split()[0]], "answer_start": [0]},
                        },
                    }[name]
                )
            (tmp_path / name).mkdir(exist_ok=True)
            path = tmp_path / name / f"{split}.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "model").mkdir()
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=60,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    word_tokenizer(tmp_path / "model").save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.fixture
def folders(data: Path) -> list[str]:
    """The options of a study that name folders, but for the results."""
    found = {"data": data, "checkpoints": data / "fine", "model": data / "model"}
    return [text for name, path in found.items() for text in (f"--{name}", str(path))]


@pytest.fixture
def pair_data(data: Path) -> Path:
    """The tiny data sets, with QNLI's."""
    rows = [json.loads(line) for line in (data / "mrpc" / "test.jsonl").read_text().splitlines()]
    questions = [
        {"question": row["sentence1"], "sentence": row["sentence2"], "label": row["label"]}
        for row in rows
    ]
    (data / "qnli").mkdir()
    (data / "qnli" / "validation.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return data
