"""All benchmarks run as modules, by themselves and in processes that they start."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.common import records
from benchmarks.corda_training import demo_rates

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FILES
    if "__main__" in path.read_text(encoding="utf-8")
    and path.stem != "llama_cpp_runner"  # which another benchmark runs in an environment of its own
]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", COMMANDS)
def test_help(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    assert end.value.code == 0
    assert f"python -m {module}" in capsys.readouterr().out


def test_benchmarks_import_no_example() -> None:
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")} | {"examples"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not examples.intersection(name.partition(".")[0] for name in names), path


def test_commands_in_reports_name_the_module_and_no_folder(tmp_path: Path) -> None:
    found = records.provenance("benchmarks.kprune.scale", ["--results", str(tmp_path)])
    assert found["command"] == f"python -m benchmarks.kprune.scale --results {tmp_path.name}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_a_child_process_measures_one_side(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    given = ["--model", tiny_model, "--length", "6", "--batch-size", "2"]
    one = json.dumps(["float32", 4, "lora"])
    assert records.in_child("benchmarks.corda_training.step", given, one) >= 0


def test_the_table_of_the_demo_is_read(tiny_model: str) -> None:
    less = {"steps": 1, "calibration_samples": 4, "test_samples": 4, "max_length": 48}
    found = demo_rates.run_demo("lora", 1e-3, 0, 1, model=tiny_model, dtype="float32", **less)
    assert list(found) == ["before", "lora"]
    assert all(perplexity > 1 for row in found.values() for perplexity in row.values())
