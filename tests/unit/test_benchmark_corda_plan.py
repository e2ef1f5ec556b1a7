"""The benchmark of the planner runs, and says how far off the plan was."""

import sys

import corda_language_model
import corda_plan
import pytest
import torch
from accelerate.utils import compare_versions
from corda_helpers import tiny_llama


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
@pytest.mark.skipif(
    compare_versions("transformers", "<", "5.0"), reason="planning needs transformers 5"
)
def test_plan_and_measurement(monkeypatch):
    monkeypatch.setattr(
        corda_language_model, "load_model", lambda model, dtype: tiny_llama().to(dtype)
    )
    threads = torch.get_num_threads()
    arguments = ["--sequences", "4", "--length", "16", "--one", "[4, 2, 1]"]
    try:
        run = corda_plan.measured(corda_plan.parse_arguments(arguments))
    finally:
        torch.set_num_threads(threads)
    assert run["measured_peak"] >= 0 and run["planned"]["modules"] == 14
    report = {"model": "m", "sequences": 4, "length": 16, "method": "kpm", "command": "c"}
    run["measured_peak"] = run["planned"]["peak"] * 2
    assert "-50%" in corda_plan.as_markdown(report | {"runs": [run]})
