"""The example that prunes a language model and trains an adapter on what is left."""

from __future__ import annotations

import json
import sys

import prune_and_recover
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kprune_ext import KPruneConfig, kprune
from tests.end_to_end.test_kprune_language_example import TEXTS
from tests.helpers.kprune_decoders import tiny_decoder
from tests.helpers.text import save_tiny_model


@pytest.mark.parametrize(("after", "distill"), [("lora", "0"), ("kpm", "0.5"), ("ipm", "1")])
@pytest.mark.filterwarnings("ignore:The calibration data have:UserWarning")
def test_a_pruned_model_learns_its_texts_again(after, distill, tmp_path, monkeypatch, capsys):
    save_tiny_model(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    given = ["prune_and_recover.py", "--model", str(tmp_path / "model"), "--after", after]
    given += ["--data", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "out")]
    given += ["--distill", distill, "--steps", "6", "--rank", "4", "--learning-rate", "1e-2"]
    given += ["--reduction", "0.25"]
    monkeypatch.setattr(sys, "argv", given)
    prune_and_recover.main()
    printed = [
        line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")
    ]
    scores = {" ".join(name): float(score) for *name, score in printed}
    assert list(scores) == ["dense", "pruned", f"pruned + {after}"]
    if distill == "0":
        assert scores["pruned + lora"] < scores["pruned"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is LlamaForCausalLM and model.config.intermediate_size < 48


def test_the_teachers_share_of_the_loss() -> None:
    teacher, batch = tiny_decoder("llama"), torch.randint(3, 30, (2, 9))
    student = kprune(teacher, [{"input_ids": batch}], KPruneConfig(reduction=0.4), progress=False)
    inputs = {"input_ids": batch, "labels": batch.clone()}
    inputs["labels"][:, :3] = -100

    def loss(share, model=student):
        made = prune_and_recover.Recovery.__new__(prune_and_recover.Recovery)
        made.teacher, made.share = teacher, share
        return float(made.compute_loss(model, inputs))

    counts = inputs["labels"][:, 1:] != -100
    one, other = (
        torch.log_softmax(model(batch).logits[:, :-1][counts], -1) for model in (student, teacher)
    )
    apart = float((other.exp() * (other - one)).sum(-1).mean())
    own = float(student(**inputs).loss)
    assert loss(0.0) == pytest.approx(own)
    assert loss(1.0) == pytest.approx(apart, rel=1e-4)
    assert loss(0.25) == pytest.approx(0.75 * own + 0.25 * apart, rel=1e-4)
    assert loss(1.0, teacher) == pytest.approx(0, abs=1e-6)
