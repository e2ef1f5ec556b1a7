"""The benchmark of sizes runs, and goes on where it stopped."""

import json
import sys

import kprune_scale
import pytest
import torch


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_one_model(monkeypatch, tmp_path):
    monkeypatch.setattr(kprune_scale, "VOCABULARY", 50)
    monkeypatch.setitem(kprune_scale.MODELS, "BERT-base", (2, 24, 4, 40, 100))
    threads = torch.get_num_threads()
    arguments = ["--length", "8", "--reduction", "0.5", "--results", str(tmp_path)]
    args = kprune_scale.parse_arguments([*arguments, "--one", "BERT-base"])
    try:
        run = kprune_scale.measured(args)
    finally:
        torch.set_num_threads(threads)
    assert 0.45 < run["flops_kept"] <= 0.5 and run["tokens"] <= 100
    report = {"runs": [run], "length": 8, "reduction": 0.5, "threads": 1, "command": "c"}
    assert "| BERT-base |" in kprune_scale.as_markdown(report)
    (tmp_path / "kprune_scale.json").write_text(json.dumps(report))
    kprune_scale.main([*arguments, "--models", "BERT-base"])  # it is there: no other process
    assert json.loads((tmp_path / "kprune_scale.json").read_text()) == report
