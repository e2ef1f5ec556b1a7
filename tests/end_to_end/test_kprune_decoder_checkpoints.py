"""Pruned decoders of every family and task: saved, and loaded with the plugin or without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.helpers.kprune_checkpoints import equal_cut, write_case, write_cases
from tests.helpers.kprune_decoders import (
    CUTS,
    DECODER_CASES,
    DECODERS,
    TASK_CLASSES,
    cut,
    equal_texts,
    tiny_decoder,
)
from tests.helpers.kprune_models import outputs_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-contained checkpoint of every family and task: with whole sub-layers gone, and uniform."""
    folder = tmp_path_factory.mktemp("decoders")
    cases: dict[str, list[tuple[str, str, float]]] = {"free": [], "uniform": []}
    for layout, tolerance in (("free", 1e-5), ("uniform", 0.0)):
        for number, (family, task) in enumerate(DECODER_CASES):
            model, kept = (
                tiny_decoder(family, task),
                CUTS[["no heads first", "neither"][number % 2]],
            )
            pruned = cut(model, kept) if layout == "free" else equal_cut(model)
            name = f"{layout} {number:02} {task}"
            write_case(folder, name, pruned, equal_texts())
            cases[layout].append((name, TASK_CLASSES[task].__name__, tolerance))
    write_cases(folder, cases)
    return folder


@pytest.mark.parametrize(("mode", "layouts"), [("plugin", 2), ("remote", 1), ("alone", 1)])
def test_every_family_and_task_in_a_new_process(
    mode: str, layouts: int, saved: Path, tmp_path: Path
) -> None:
    script = ROOT / "tests" / "helpers" / "kprune_process.py"
    path = {} if mode == "alone" else {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(saved), mode],
        cwd=tmp_path,
        env=os.environ | path | {"HF_MODULES_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith(f"compared {layouts * len(DECODER_CASES)}")


@pytest.mark.parametrize("family", DECODERS)
def test_a_loaded_decoder_generates_the_same_text(family: str, tmp_path: Path) -> None:
    model = tiny_decoder(family)
    model.generation_config.update(max_new_tokens=6, repetition_penalty=1.3, eos_token_id=None)
    pruned = cut(model, CUTS["no heads first"])
    assert pruned.generation_config.repetition_penalty == 1.3
    pruned.save_pretrained(tmp_path, max_shard_size="10KB")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(pruned)
    assert loaded.generation_config.repetition_penalty == 1.3
    batch = equal_texts()
    for name, weight in pruned.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    one, other = (outputs_of(each, batch)[0] for each in (loaded, pruned))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(loaded.generate(**batch), pruned.generate(**batch))
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == bool(loaded.config.tie_word_embeddings)


@pytest.mark.parametrize("family", DECODERS)
def test_the_body_loads_from_a_language_model(family: str, tmp_path: Path) -> None:
    pruned, batch = cut(tiny_decoder(family), CUTS["some"]), equal_texts()
    pruned.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    expected = outputs_of(pruned.base_model, batch)[0]
    torch.testing.assert_close(outputs_of(body, batch)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_the_config_names_the_key_value_heads_that_stay(family: str, tmp_path: Path) -> None:
    cut(tiny_decoder(family), CUTS["neither"]).save_pretrained(tmp_path)
    rows = AutoConfig.from_pretrained(tmp_path).kprune["layers"]
    assert [row["num_key_value_heads"] for row in rows] == [0, 2, 0]
    assert [row["key_value_heads"] for row in rows] == ["", "0-1", ""]
    assert [row["neurons"] for row in rows] == ["", "4,6,8", ""]
