"""The benchmark of the forecast runs, and says how far off the forecast was."""

import sys

import pytest
import torch
from accelerate.utils import compare_versions

from benchmarks.corda_training import plan
from tests.helpers.corda import tiny_llama


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
@pytest.mark.skipif(
    compare_versions("transformers", "<", "5.0"), reason="planning needs transformers 5"
)
def test_plan_and_measurement(monkeypatch):
    monkeypatch.setattr(plan, "load_model", lambda model, dtype: tiny_llama().to(dtype))
    threads = torch.get_num_threads()
    arguments = ["--sequences", "4", "--length", "16", "--one", "[4, 2, 1]"]
    try:
        run = plan.measured(plan.parse_arguments(arguments))
    finally:
        torch.set_num_threads(threads)
    assert run["measured_peak"] >= 0 and run["planned"]["modules"] == 14
    report = {"model": "m", "sequences": 4, "length": 16, "method": "kpm", "command": "c"}
    run["measured_peak"] = run["planned"]["peak"] * 2
    assert "-50%" in plan.as_markdown(report | {"runs": [run]})
