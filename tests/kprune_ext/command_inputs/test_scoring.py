"""Scores on files, against scores of the model's outputs for one row at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import ViTImageProcessor

from kprune_ext.command_inputs.inputs import Loaded
from kprune_ext.command_inputs.scoring import rows_to_score, scoring_for
from kprune_ext.command_inputs.search_options import SearchOptions
from kprune_ext.evaluation.metrics import accuracy, binary_f1, macro_f1, spearman
from tests.helpers.kprune import tiny_bert, word_tokenizer
from tests.helpers.kprune_models import tiny

ROWS = [
    {
        "text": " ".join(f"word{n}" for n in range(row % 5, row % 5 + 2 + row % 7)),
        "sentence1": f"word{row} word3 word{2 * row}",
        "sentence2": f"word{row + 1} word{row % 4}",
        "label": row % 2,
        "score": row * 7 % 11 / 2,
        "name": f"LABEL_{row % 2}",
    }
    for row in range(16)
]


def score_of(model: Any, folder: Path, rows: Any = ROWS, **options: Any) -> float:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {
        "model": str(folder),
        "data": "",
        "output": "",
        "eval_data": str(folder / "rows.jsonl"),
    }
    made = SearchOptions(**given | {"batch_size": 3} | options)
    loaded = Loaded(model.config, model, word_tokenizer(folder), None)
    found = scoring_for(made, loaded, rows_to_score(made))
    assert json.loads(json.dumps(found.about)) and found.greater_is_better
    return found.evaluate(model)


@torch.no_grad()
def outputs(model: Any, folder: Path, *fields: str) -> list[Any]:
    tokenizer = word_tokenizer(folder)
    return [model(**tokenizer(*(r[f] for f in fields), return_tensors="pt")) for r in ROWS]


def test_classes(tmp_path: Path) -> None:
    wanted = torch.tensor([row["label"] for row in ROWS])
    model = tiny_bert(labels=2)
    found = torch.cat([o.logits for o in outputs(model, tmp_path, "text")]).argmax(1)
    assert 0 < accuracy(found, wanted) < 1
    assert score_of(model, tmp_path, eval="accuracy") == pytest.approx(accuracy(found, wanted))
    named = score_of(model, tmp_path, eval="f1", label_field="name")
    assert named == pytest.approx(binary_f1(found, wanted))
    first = score_of(model, tmp_path, eval="accuracy", eval_rows=5)
    assert first == pytest.approx(accuracy(found[:5], wanted[:5]))
    model = tiny_bert(labels=3, seed=2)
    pairs = outputs(model, tmp_path, "sentence1", "sentence2")
    found = torch.cat([o.logits for o in pairs]).argmax(1)
    both = {"eval": "f1", "eval_field": ["sentence1", "sentence2"]}
    assert score_of(model, tmp_path, **both) == pytest.approx(macro_f1(found, wanted))
    # Rows without a text or a label are left out.
    gaps = [*ROWS, ROWS[0] | {"sentence2": None}, ROWS[0] | {"label": None}]
    assert score_of(model, tmp_path, gaps, **both) == pytest.approx(macro_f1(found, wanted))


def test_embeddings_and_regression(tmp_path: Path) -> None:
    wanted = torch.tensor([row["score"] for row in ROWS])
    model: Any = tiny_bert().bert
    fields = ("sentence1", "sentence2")
    hidden = [[o.last_hidden_state[0] for o in outputs(model, tmp_path, f)] for f in fields]
    for pooling in ("mean", "cls"):
        first, second = (
            torch.stack([h.mean(0) if pooling == "mean" else h[0] for h in side]) for side in hidden
        )
        expected = spearman(torch.cosine_similarity(first, second), wanted)
        options = {"eval": "spearman", "label_field": "score", "pooling": pooling}
        assert score_of(model, tmp_path, **options) == pytest.approx(expected, abs=1e-3)
    model = tiny_bert(labels=1)
    found = torch.cat([o.logits[:, 0] for o in outputs(model, tmp_path, "text")])
    scored = score_of(model, tmp_path, eval="spearman", label_field="score")
    assert scored == pytest.approx(spearman(found, wanted))


def test_images(tmp_path: Path) -> None:
    model = tiny("vit")
    pictures = [Picture.new("RGB", (16, 16), (20 * n, 90, 250 - 20 * n)) for n in range(9)]
    features = Features({"image": Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": pictures, "label": [n % 3 for n in range(9)]}, features)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    options = SearchOptions(
        model="", data="", output="", eval="accuracy", eval_data="", batch_size=4
    )
    found = scoring_for(options, Loaded(model.config, model, processor, None), rows)
    with torch.no_grad():
        logits = model(**processor(pictures, return_tensors="pt")).logits
    wanted = accuracy(logits.argmax(1), torch.tensor(rows["label"]))
    assert found.evaluate(model) == pytest.approx(wanted)
