"""Models and data as files, for the commands that score models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.helpers.kprune import word_tokenizer

Given = Callable[..., list[str]]


def words(count: int, generator: torch.Generator) -> str:
    return " ".join(f"word{n}" for n in torch.randint(0, 50, (count,), generator=generator))


@pytest.fixture
def given(tmp_path: Path) -> Given:
    """Saves a model with its tokenizer and data, and returns the arguments of a command."""

    def saved(command: str, model: PreTrainedModel, score: str, **changed: Any) -> list[str]:
        folder = tmp_path / "source"
        model.save_pretrained(folder)
        tokenizer = word_tokenizer(folder)
        tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        rows = [
            {
                "text": words(7, generator),
                "sentence1": words(5, generator),
                "sentence2": words(4, generator),
                "label": row % 3,
                "score": float(row % 6),
            }
            for row in range(40)
        ]
        for name, part in (("data", rows[:24]), ("test", rows[24:])):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
        options = {
            "model": folder,
            "data": folder / "data.jsonl",
            "output": tmp_path / "out",
            "eval": score,
            "eval_data": folder / "test.jsonl",
            "batch_size": 8,
        }
        return [command, *(f"--{name}={value}" for name, value in (options | changed).items())]

    return saved
