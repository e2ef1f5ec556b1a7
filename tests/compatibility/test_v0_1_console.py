"""The console programs with files of version 0.1."""

from __future__ import annotations

import importlib

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from kprune_ext import KPruneReport, load_report
from tests.helpers.v0_1 import DATA, check_same, expected, load_base, start_key


def run_program(package: str, arguments: list[str]) -> None:
    """What a console program does: `main` of `cli`, or of `cli.main` if that is a package."""
    main = importlib.import_module(f"{package}.cli").main
    (main if callable(main) else main.main)(arguments)


@pytest.mark.parametrize(
    ("package", "command"), [("peft_corda", "calibrate"), ("kprune_ext", "prune")]
)
def test_options_in_a_file(package: str, command: str, capsys) -> None:
    """What --print_config printed is a --config file; names and spellings may be others by now."""
    written = yaml.safe_load((DATA / "json" / f"{command}.yaml").read_text(encoding="utf-8"))
    with pytest.raises(SystemExit) as stopped:
        run_program(package, [command, f"--config=json/{command}.yaml", "--print_config"])
    assert not stopped.value.code
    found = yaml.safe_load(capsys.readouterr().out)
    assert len(found) >= len(written)
    values = list(found.values())
    for name, value in written.items():
        assert found.get(name) == value or name == "task" or value in values, name


def test_console_programs_read_old_files(tmp_path, capsys) -> None:
    run_program(
        "peft_corda",
        ["report", "factors/both-covariance.safetensors", "--method=ipm", "--mean_rank=2"],
    )
    assert "rank_pattern" in capsys.readouterr().out
    run_program("peft_corda", ["export", "adapters/llama", str(tmp_path / "lora")])
    check_same(
        load_file(tmp_path / "lora" / "adapter_model.safetensors"),
        load_file("exported/llama/adapter_model.safetensors"),
    )
    run_program("kprune_ext", ["report", "pruned/bert", f"--json={tmp_path / 'report.json'}"])
    assert KPruneReport.load_json(tmp_path / "report.json") == load_report("pruned/bert")


def test_console_program_starts_an_adapter_from_old_factors(tmp_path) -> None:
    arguments = ["init", "--model=bases/llama", "--factors=factors/kpm-covariance.safetensors"]
    arguments += ["--r=4", "--rank_pattern={k_proj: 2}", "--device=cpu"]
    run_program("peft_corda", [*arguments, f"--output={tmp_path / 'adapter'}"])
    adapted = PeftModel.from_pretrained(load_base("llama"), tmp_path / "adapter").eval()
    state = adapted.state_dict()
    wanted = expected("factors", "kpm-covariance")
    for key in (key for key in wanted if key.startswith("start/")):
        near = 1e-4 * float(wanted[key].abs().max())
        torch.testing.assert_close(
            state[start_key(key.removeprefix("start/"))], wanted[key], rtol=1e-4, atol=near
        )
