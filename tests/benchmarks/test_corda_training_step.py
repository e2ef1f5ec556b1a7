"""The benchmark of a training step runs, and measures what it says."""

import gc
import json

import pytest
import torch
from torch import nn

from benchmarks.corda_training import step
from peft_corda.adapter_layers.layer import CordaLayer
from tests.helpers.corda import tiny_llama


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    gc.freeze()  # the benchmark collects garbage often: of its own, not of all tests before it
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def test_report_is_written_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "load_model", lambda model, dtype: tiny_llama().to(dtype))
    monkeypatch.setattr(step, "measure_memory", lambda *_: {"lora": 200, "corda": 210})
    options = ["--ranks", "4", "--widths", "32", "--layer-ranks", "4", "--tokens", "8"]
    options += ["--batch-size", "2", "--length", "6", "--repeats", "2", "--layer-repeats", "3"]
    step.main([*options, "--output", str(tmp_path)])
    report = json.loads((tmp_path / "corda_step.json").read_text())
    assert set(report["time"]) == {"model, float32, r=4", "layer 32 x 32, float32, r=4"}
    seconds = report["time"]["model, float32, r=4"]["forward + backward"]
    assert len(seconds["lora"]) == len(seconds["corda"]) == 2
    assert all(value > 0 for side in seconds.values() for value in side)
    assert "1.050×" in (tmp_path / "corda_step.md").read_text()
    # Another rank; the results so far stay as they are.
    step.main([*options, "--ranks", "2", "--output", str(tmp_path)])
    later = json.loads((tmp_path / "corda_step.json").read_text())
    assert later["time"]["model, float32, r=4"]["forward + backward"] == seconds
    assert "model, float32, r=2" in later["time"]


def test_both_sides_do_the_same_work():
    """Gradients of both factors and of the input, and no adapter that is zero or at its start."""
    x = torch.randn(5, 16, requires_grad=True)
    for side in step.CONFIGS:
        model = step.adapted(nn.Sequential(nn.Linear(16, 16)), side, 4, "0")
        model(x).sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 2
        assert all(p.grad is not None and p.grad.any() for p in trained)
        assert x.grad is not None
        x.grad = None
        for layer in model.modules():
            if isinstance(layer, CordaLayer):
                assert all(factor.any() for factor in layer.factors_of("default"))


def test_ratio_is_that_of_neighbours():
    assert step.ratio({"lora": [1.0, 2.0, 10.0], "corda": [1.1, 2.2, 30.0]}) == pytest.approx(1.1)
