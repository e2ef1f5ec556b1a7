"""The study of recovery after pruning a decoder, in a tiny setting."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import torch

from benchmarks.common.models import load_model, load_tokenizer
from benchmarks.kprune import decoder_recovery
from benchmarks.kprune.decoder_baselines import prune_by_flap
from benchmarks.kprune.decoder_data import Texts, batches_of, calibration
from benchmarks.kprune.decoder_training import pruned_model, training_rows
from tests.benchmarks.test_kprune_decoders import data, model  # noqa: F401

SETTINGS = ["--tokens", "600", "--length", "24", "--windows", "4", "--questions", "4"]


def run(model: Path, data: Path, folder: Path, *others: str) -> dict:  # noqa: F811
    given = ["--data", str(data), "--model", str(model), "--results", str(folder)]
    given += [*SETTINGS, "--threads", "1", "--rank", "2", "--batch-size", "2", *others]
    decoder_recovery.main(given)
    return json.loads((folder / "kprune_decoder_recovery.json").read_text())


def test_rates_are_chosen_and_seeds_follow(model, data, tmp_path) -> None:  # noqa: F811
    chosen = ["--after", "none", "lora", "kpm", "distill", "--pruned", "uniform", "flap"]
    settings = [*chosen, "--rates", "1e-4", "3e-2", "--minutes", "0.005", "--seeds", "0", "1"]
    settings += ["--pruned-models", str(tmp_path / "pruned")]
    report = run(model, data, tmp_path, *settings)
    runs = {}
    for each in report["runs"]:
        runs.setdefault((each["pruned"], each["after"]), []).append(each)
    assert set(runs) == {
        (p, a) for p in ("uniform", "flap") for a in ("none", "lora", "kpm", "distill")
    }
    for (_, after), own in runs.items():
        assert len(own) == (2 if after == "none" else 3)
        if after != "none":
            best = min(own[:2], key=lambda one: one["scores"]["validation"])
            assert own[2]["rate"] == best["rate"] and own[2]["seed"] == 1
            assert all(one["steps"] > 0 for one in own)
    table = (tmp_path / "kprune_decoder_recovery.md").read_text()
    assert "| 30% | flap | lora |" in table and "| 1.000 |" in table
    kept = sorted(path.name for path in (tmp_path / "pruned").iterdir())
    assert [name.partition("uniform")[2] for name in kept] == ["-0.3-600-0", "-0.3-600-1"]
    again = run(model, data, tmp_path, *settings)
    assert len(again["runs"]) == len(report["runs"])


def test_what_flap_leaves_computes_what_its_masked_model_does(model, data) -> None:  # noqa: F811
    dense, tokenizer = load_model(str(model), torch.float32), load_tokenizer(str(model))
    texts = Texts(data, tokenizer, 24)
    settings = {"tokens": 600, "seed": 0, "pruned": "flap", "reduction": 0.3}
    smaller = pruned_model(dense, texts, settings, tokenizer.pad_token_id)
    masked = deepcopy(dense)
    batches = batches_of(calibration(texts, "wikitext2", 600, 0), 4096, tokenizer.pad_token_id)
    prune_by_flap(masked, batches, 0.3)
    rows, held_out = training_rows(texts, 0)
    assert len({*map(tuple, rows.tolist())} & {*map(tuple, held_out.tolist())}) == 0
    with torch.no_grad():
        torch.testing.assert_close(smaller(rows[:2]).logits, masked(rows[:2]).logits)
    assert smaller.num_parameters() < masked.num_parameters()
