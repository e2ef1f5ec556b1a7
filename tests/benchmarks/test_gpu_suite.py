"""The GPU study: every part rehearsed on the CPU, resuming, and what it says where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import cells, device_tests, pruning, start, step, study, suite
from tests.benchmarks.test_corda_training_finetune import data  # noqa: F401

ROOT = Path(__file__).parents[2]


def options(folder: Path) -> list[str]:
    return ["--device", "cpu", "--tiny", "--results", str(folder)]


def report_of(folder: Path, name: str) -> dict:
    assert (folder / f"{name}.md").read_text()
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("part", [step, pruning])
def test_a_part_runs_and_is_finished(part, tmp_path):
    part.main(options(tmp_path))
    report = report_of(tmp_path, f"gpu_{part.__name__.rpartition('.')[2]}")
    errors = {key: cell["error"] for key, cell in report["cells"].items() if "error" in cell}
    assert not errors
    assert report["finished"]
    assert report["device"] == "CPU"


def test_the_start_is_compared_with_peft(tmp_path):
    start.main(options(tmp_path))
    report = report_of(tmp_path, "gpu_start")
    found = report["cells"]
    layers = {key for key in found if key.startswith("layer") and "ours" in key}
    assert len(layers) == 6
    for key in layers:
        assert found[key]["energy_relative_to_optimum"] == pytest.approx(1, rel=1e-2)
    total = start.peft_total(found)
    statistics = found["model: PEFT's statistics"]
    assert sum(statistics["shapes"].values()) == found["model: ours, kpm"]["modules"]
    assert total > statistics["seconds"]
    assert "whole model, kpm" in (tmp_path / "gpu_start.md").read_text()


def test_the_best_energy_is_that_of_the_singular_values():
    torch.manual_seed(0)
    for shape in ((12, 20), (20, 12)):
        product = torch.randn(*shape, dtype=torch.float64)
        squares = torch.linalg.svdvals(product).square()
        assert start.best_energy(product, "ipm", 3) == pytest.approx(float(squares[:3].sum()))
        assert start.best_energy(product, "kpm", 3) == pytest.approx(float(squares[-3:].sum()))


def test_the_marked_tests_run_and_are_counted(tmp_path):
    one = "tests/device/test_corda_on_device.py::test_autocast_starts_exactly"
    device_tests.main([*options(tmp_path), "--workers", "1", "--select", one])
    cell = report_of(tmp_path, "gpu_device_tests")["cells"][one]
    assert (cell["passed"], cell["failed"], cell["skipped"]) == (2, 0, 0)


def test_a_failing_test_is_reported(tmp_path):
    path = tmp_path / "test_broken.py"
    path.write_text(
        "import pytest\n@pytest.mark.device\ndef test_one(): assert 1 == 2\n"
        "@pytest.mark.device\ndef test_two(): pytest.skip('not here')\n"
    )
    with pytest.raises(SystemExit):
        device_tests.main([*options(tmp_path), "--workers", "1", "--select", str(path)])
    cell = report_of(tmp_path, "gpu_device_tests")["cells"][str(path)]
    assert (cell["passed"], cell["failed"], cell["skipped"]) == (0, 1, 1)
    assert "1 == 2" in next(iter(cell["failures"].values()))


def test_the_study_runs(data, tiny_model, tmp_path):  # noqa: F811
    given = ["--model", tiny_model, "--data", str(data)]
    study.main([*options(tmp_path), *given])
    report = report_of(tmp_path, "gpu_study")
    assert [run["method"] for run in report["runs"]] == ["lora", "kpm"]


def test_cells_are_resumed_and_errors_tried_again(tmp_path):
    args = cells.part_parser("").parse_args(options(tmp_path))

    def make() -> cells.Cells:
        return cells.Cells("gpu_x", "benchmarks.gpu.x", args, [], lambda report: "table")

    def fail() -> dict:
        raise RuntimeError("no memory")

    first = make()
    first.run("good", lambda: {"seconds": 1.0})
    first.run("bad", fail)
    assert first.failed() == ["bad"]
    again = make()
    again.run("good", fail)
    again.run("bad", lambda: {"seconds": 2.0})
    assert report_of(tmp_path, "gpu_x")["cells"] == {
        "good": {"seconds": 1.0},
        "bad": {"seconds": 2.0},
    }


def test_results_of_another_device_are_not_resumed(tmp_path):
    (tmp_path / "gpu_x.json").write_text('{"device": "H100", "finished": true, "cells": {"a": {}}}')
    found = cells.started_report(tmp_path, "gpu_x", torch.device("cpu"))
    assert found == {"device": "CPU", "cells": {}}


def test_the_suite_runs_parts_within_their_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "LIMITS", {"start": 100, "study": 100})
    monkeypatch.setattr(suite, "command_of", lambda name, args: [sys.executable, "-c", "pass"])
    suite.main(options(tmp_path))
    out = capsys.readouterr().out
    assert "start: done" in out
    assert "study: left out: it needs --model and --data" in out
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(suite, "command_of", lambda name, args: sleep)
    suite.main([*options(tmp_path), "--parts", "start", "--minutes", "0.1"])
    assert "cut off after 6 s" in capsys.readouterr().out
    monkeypatch.setattr(suite, "command_of", lambda name, args: [sys.executable, "-c", "1 / 0"])
    with pytest.raises(SystemExit):
        suite.main([*options(tmp_path), "--parts", "start"])
    (tmp_path / "gpu_start.json").write_text('{"device": "CPU", "finished": true, "cells": {}}')
    suite.main([*options(tmp_path), "--parts", "start"])
    assert "finished before" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="runs a shell script")
def test_without_a_gpu_the_script_says_what_it_lacks(tmp_path):
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu" / "run.sh", "--results", tmp_path],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "--device cuda: PyTorch" in done.stderr
    assert "--device cpu --tiny" in done.stderr
    assert not list(tmp_path.iterdir())
