"""The benchmark of sizes runs, and resumes where it stopped."""

import json
import sys

import pytest
import torch

from benchmarks.kprune import scale


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_one_model(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "VOCABULARY", 50)
    monkeypatch.setitem(scale.MODELS, "BERT-base", (2, 24, 4, 40, 100))
    threads = torch.get_num_threads()
    arguments = ["--length", "8", "--reduction", "0.5", "--results", str(tmp_path)]
    args = scale.parse_arguments([*arguments, "--one", "BERT-base"])
    try:
        run = scale.measured(args)
    finally:
        torch.set_num_threads(threads)
    assert 0.45 < run["flops_kept"] <= 0.5 and run["tokens"] <= 100
    report = {"runs": [run], "length": 8, "reduction": 0.5, "threads": 1, "command": "c"}
    assert "| BERT-base |" in scale.as_markdown(report)
    (tmp_path / "kprune_scale.json").write_text(json.dumps(report))
    scale.main([*arguments, "--models", "BERT-base"])  # nothing is missing, so no process starts
    assert json.loads((tmp_path / "kprune_scale.json").read_text()) == report
