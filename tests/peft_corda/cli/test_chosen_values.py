"""What `peft-corda` chooses where the options do not say, and that it says so."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import LlamaConfig

from kprune_ext.common import memory
from peft_corda import CordaFactors, CordaReport, calibrate, cli
from peft_corda.cli import calibrate as command
from peft_corda.cli.plan import fewer_passes
from tests.helpers.corda import make_batches, make_config, make_model
from tests.helpers.text import SENTENCES, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tokenizer().save_pretrained(folder / "llama")
    make_model("llama").save_pretrained(folder / "llama")
    (folder / "data.txt").write_text("\n".join(SENTENCES))
    for name, options, methods in (
        ("plain", {"r": 6}, ("kpm",)),
        ("uneven", {"r": 6, "rank_pattern": {"q_proj": 3}}, ("kpm", "ipm")),
        ("root", {"r": 4, "corda_weighting": "sqrt_covariance"}, ("ipm",)),
    ):
        config = make_config(**{"corda_method": None, **options})
        calibrate(make_model("llama"), config, make_batches(), methods=methods, progress=False)
        config.corda_factors.save(folder / name)
    return folder


def started(folder, output, name, *more):
    model = folder / "llama"
    cli.main(
        ["init", f"--model={model}", f"--factors={folder / name}", f"--output={output}", "--device=cpu",
         *more]
    )  # fmt: skip
    return json.loads((output / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("name", "rank", "method", "weighting"),
    [
        ("plain", 6, "kpm", "covariance"),
        ("uneven", 6, "kpm", "covariance"),
        ("root", 4, "ipm", "sqrt_covariance"),
    ],
)
def test_an_adapter_is_what_its_factors_say(
    folder, tmp_path, name, rank, method, weighting, capsys
):
    config = started(folder, tmp_path / "adapter", name)
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert (config["corda_method"], config["corda_weighting"]) == (method, weighting)
    said = capsys.readouterr().out
    assert f"{method}, r={rank} from {folder / name}, lora_alpha={rank}." in said
    adapted = PeftModel.from_pretrained(make_model("llama"), tmp_path / "adapter")
    small = adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].out_features
    assert small == (3 if name == "uneven" else rank)


def test_given_values_are_used(folder, tmp_path, capsys):
    config = started(folder, tmp_path / "a", "plain", "--r=2", "--lora_alpha", "8")
    assert (config["r"], config["lora_alpha"]) == (2, 8)
    assert "r=2, lora_alpha=8; the paper's setting is lora_alpha = r." in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"hold 'kpm', but method='ipm' was given"):
        started(folder, tmp_path / "b", "plain", "--corda_method=ipm")
    assert not (tmp_path / "b").exists()


def options(folder, output, *more):
    data, model = folder / "data.txt", folder / "llama"
    return [
        "calibrate", f"--model={model}", f"--data={data}", f"--output={output}", "--device=cpu",
        "--num_samples=8", "--max_length=8", "--r=4", *more,
    ]  # fmt: skip


def test_the_memory_limit_is_half_of_what_is_free(folder, tmp_path, monkeypatch, capsys):
    seen = []

    def seeing(*args, **kwargs):
        seen.append(args[3])
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(command, "calibrate", seeing)
    monkeypatch.setattr(command, "available_memory", lambda device: 6 * 2**30)
    cli.main(options(folder, tmp_path / "one"))
    assert "max_memory is 3.0 GiB, half of what is free on cpu." in capsys.readouterr().err
    cli.main(options(folder, tmp_path / "two", "--max-memory=1GiB"))
    cli.main(options(folder, tmp_path / "three", f"--checkpoint_dir={tmp_path / 'parts'}"))
    said = capsys.readouterr().err
    assert "so that the calibration can be resumed" in said and "half of what" not in said
    monkeypatch.setattr(command, "available_memory", lambda device: 1000)
    cli.main(options(folder, tmp_path / "four"))
    assert seen == [3 * 2**30, "1GiB", None, None]


def test_free_memory_of_a_container(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    whole = SimpleNamespace(available=100)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: whole)
    monkeypatch.setattr(memory, "Path", lambda _, name: tmp_path / name)
    assert memory.available_memory(cpu) == 100
    for limit, used, free in (
        ("70", "30", 40),
        ("max", "30", 100),
        ("900", "0", 100),
        ("5", "9", 0),
    ):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        assert memory.available_memory(cpu) == free


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="plans need transformers 5"
)
def test_a_plan_has_seconds_and_says_what_halves_the_passes(tmp_path, capsys):
    about = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    about.save_pretrained(tmp_path)
    arguments = ["plan", f"--model={tmp_path}", "--num-samples=4", "--max-length=32"]
    cli.main([*arguments, "--max_memory=600KB", f"--json={tmp_path / 'plan.json'}"])
    lines = capsys.readouterr().out.splitlines()
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["passes"] > 3 and 0 < plan["seconds"] < 100
    assert any(line.startswith("Takes a") and "this machine" in line for line in lines)
    assert (
        lines[-1].startswith("With --max_memory") and f"instead of {plan['passes']}." in lines[-1]
    )
    size = lines[-1].split()[2].rstrip(",")
    cli.main([*arguments, f"--max_memory={size}", f"--json={tmp_path / 'less.json'}"])
    assert json.loads((tmp_path / "less.json").read_text())["passes"] <= -(-plan["passes"] // 2)
    cli.main(arguments)
    assert "passes" not in capsys.readouterr().out.splitlines()[-1]
    cli.main([*arguments, "--max_memory=1GiB"])
    assert "--max_memory" not in capsys.readouterr().out.splitlines()[-1]


def test_no_advice_where_memory_does_not_help():
    found = SimpleNamespace(passes=4, statistics=10, hidden_states=0)
    assert fewer_passes(found, lambda limit: found) is None


class TestForms:
    def test_markdown_and_json(self, folder, capsys):
        arguments = ["report", str(folder / "uneven"), "--method=kpm", "--mean_rank=2"]
        cli.main([*arguments, "--format=json"])
        found = json.loads(capsys.readouterr().out)
        assert found["method"] == "kpm" and len(found["rank_pattern"]) == len(found["modules"])
        cli.main([*arguments, "--format", "md"])
        said = capsys.readouterr().out
        assert (
            said.startswith("| module | out × in | rank |\n"[:24]) and "- q_proj: 2 modules" in said
        )
        assert said.count("\n| model.layers.") == len(found["modules"])

    def test_in_a_repl_and_a_notebook(self, folder):
        from peft_corda import report

        own = report(CordaFactors.load(folder / "plain"))
        assert isinstance(own, CordaReport)
        assert len(repr(own).splitlines()) <= 20 and repr(own).startswith("CorDA kpm, 14 modules")
        assert own._repr_html_().count("<tr>") == 15 and "<pre>CorDA kpm" in own._repr_html_()
