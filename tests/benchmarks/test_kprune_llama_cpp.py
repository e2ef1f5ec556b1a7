"""What can be tried of the benchmarks of llama.cpp without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.kprune import llama_cpp, llama_cpp_families
from kprune_ext.architectures.llama_cpp import LLAMA_CPP
from tests.helpers.gguf import byte_level
from tests.helpers.gguf_graph import Graph
from tests.helpers.kprune_decoders import CUTS, cut, tiny_decoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = byte_level()
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = cut(tiny_decoder("llama", **options), CUTS["some"])
    model.save_pretrained(tmp_path / "free")
    tokenizer.save_pretrained(tmp_path / "free")
    return tmp_path / "free"


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_export_and_continuations(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "settle", lambda: 0)  # which tests in one process disturb
    given = ["--data", "none", "--checkpoints", str(folder.parent), "--layouts", "free"]
    llama_cpp.main([*given, "--one", "free"])
    measured = json.loads(capsys.readouterr().out)
    assert measured["same_file"] and measured["file_mib"] > 0
    assert sorted(path.name for path in folder.parent.glob("*.gguf")) == ["free.gguf"]
    ours = llama_cpp.continued(folder, 5)
    assert len(ours["continuations"]) == len(llama_cpp.PROMPTS) == 10
    graph = Graph(folder.parent / "free.gguf")
    for number in (0, 4):
        ids = ours["ids"][number]
        for token in ours["continuations"][number]:  # greedily, as llama.cpp would
            assert int(graph.logits(torch.tensor(ids))[-1].argmax()) == token
            ids = [*ids, token]


def test_comparison() -> None:
    ours = {
        "ids": [[1], [2]],
        "continuations": [[3, 4], [5, 6]],
        "logits": np.zeros((2, 3), dtype=np.float32),
    }
    theirs = {
        "ids": [[1], [9]],
        "continuations": [[3, 4], [5, 7]],
        "logits": np.full((2, 3), 0.25, dtype=np.float32),
    }
    found = llama_cpp.compared(ours, theirs)
    assert (found["same_ids"], found["same_continuations"], found["same_tokens"]) == (1, 1, 3)
    assert found["tokens"] == 4 and found["logits_apart"] == 0.25


def test_tables() -> None:
    run = {
        "architecture": "deci", "weights_mib": 2.0, "tensor_mib": 1.0, "margin": 0.1, "prompts": 2,
        "same_ids": 2, "same_continuations": 1, "same_tokens": 3, "tokens": 4, "logits_apart": 0.25,
        "export": {"file_mib": 3.0, "peak_mib": 1.0, "peak_mib_in_memory": 0.5},
    }  # fmt: skip
    report = {
        "model": "tiny", "reduction": 0.3, "llama_cpp_python": "1", "commands": ["python"],
        "runs": {"free": run},
    }  # fmt: skip
    assert "| free | `deci` | 2 | 3 | 1 | 1 | 0 | 2 of 2 | 1 of 2 | 3 of 4 |" in (
        llama_cpp.as_markdown(report)
    )
    other = run | {"family": "Llama", "layout": "free", "padded": True, "relative": 1e-6}
    text = llama_cpp_families.as_markdown(
        {"runs": [other | {"version": "1"}], "commands": ["python"]}
    )
    assert "| Llama | free, filled up | `deci` | 3 of 4 |" in text


def test_every_family_is_compared() -> None:
    kinds = {kind for kind, _ in llama_cpp_families.FAMILIES.values()}
    assert kinds == set(LLAMA_CPP)
    first = llama_cpp_families.random_model("Llama", 50)
    assert isinstance(first, AutoModelForCausalLM._model_mapping[type(first.config)])
