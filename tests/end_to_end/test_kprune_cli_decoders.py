"""The command `kprune` for causal language models: pruning, and plans of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kprune_ext import KPruneReport
from kprune_ext.cli.main import main
from kprune_ext.cli.prune import prune_config
from kprune_ext.command_inputs.language_inputs import (
    answered_prompts,
    packed_windows,
    sequence_tokens,
)
from kprune_ext.command_inputs.options import PruneOptions
from peft_corda import CordaConfig, CordaFactors, calibrate
from peft_corda import cli as corda
from tests.helpers.kprune import word_tokenizer
from tests.helpers.kprune_decoders import tiny_decoder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a decoder, a tokenizer and a data file."""
    folder = tmp_path / "source"
    tiny_decoder("llama", intermediate_size=200).save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def text(words: int) -> str:
        return " ".join(f"word{n}" for n in torch.randint(0, 50, (words,), generator=generator))

    rows = [{"text": text(9), "question": text(5), "answer": text(2)} for _ in range(60)]
    rows[3] = {"text": "", "question": None, "answer": "word1"}
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def tokenizer(folder: Path):
    words = word_tokenizer(folder)
    words.eos_token = "[SEP]"
    return words


def command(name: str, source: Path, *more: str) -> None:
    main([name, f"--model={source}", *more])


def pruned(source: Path, out: Path, *more: str) -> KPruneReport:
    command("prune", source, f"--data={source / 'data.jsonl'}", f"--output={out}", *more)
    return KPruneReport.load_json(out / "kprune_report.json")


def test_prune_writes_a_language_model(source: Path, tmp_path: Path, capsys) -> None:
    report = pruned(
        source, tmp_path / "out", "--task=causal-lm", "--reduction=0.3", "--max_length=16"
    )
    assert (report.metric, report.sequence_length) == ("params", 16)
    assert report.tokens + report.held_out_tokens > 500 and report.perplexity is not None
    assert "held-out tokens" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")("word3 word4", return_tensors="pt")
    assert model.generate(words["input_ids"], max_new_tokens=3, do_sample=False).shape[1] > 3
    assert model.num_parameters() == report.parameters < report.parameters_before


def test_the_task_is_read_from_the_config(source: Path, tmp_path: Path, capsys) -> None:
    report = pruned(
        source, tmp_path / "out", "--layout=uniform", "--round_to=16", "--max_length=16"
    )
    assert len({(row.kind, row.units) for row in report.sublayers}) == 2
    assert all(row.units % 16 == 0 for row in report.sublayers if row.kind == "ffn")
    assert "Load it as usual." in capsys.readouterr().out
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is LlamaForCausalLM
    main(["report", str(tmp_path / "out")])
    assert "key-value groups and neurons" in capsys.readouterr().out


def test_prompts_with_answers(source: Path, tmp_path: Path) -> None:
    fields = '["question", "answer"]'
    report = pruned(source, tmp_path / "out", "--text_field", fields, "--metric=cache")
    assert report.samples == 56 and report.metric == "cache"  # 59 rows have both, 3 are held out
    assert report.held_out_tokens == 3 * 3  # two words and the end


def test_texts_are_packed_into_windows(tmp_path: Path) -> None:
    words = tokenizer(tmp_path)
    batches = list(packed_windows(iter(["word1 word2", "word3", "word4 word5"]), words, 3, 2))
    windows = [row for batch in batches for row in batch["input_ids"].tolist()]
    end, start = words.eos_token_id, words.convert_tokens_to_ids("word1")
    flat = [start, start + 1, end, start + 2, end, start + 3, start + 4, end]
    assert windows == [flat[:3], flat[3:6], flat[6:]]
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]


def test_windows_begin_with_the_first_token_of_a_text(tmp_path: Path) -> None:
    words = tokenizer(tmp_path)
    words.bos_token = "[CLS]"  # with which this tokenizer begins every text
    (batch,) = packed_windows(iter(["word1 word2 word3 word4 word5"]), words, 3, 9)
    assert batch["input_ids"].shape == (3, 3)
    assert set(batch["input_ids"][:, 0].tolist()) == {words.bos_token_id}


def test_labels_are_the_answers(tmp_path: Path) -> None:
    words = tokenizer(tmp_path)
    pairs = [("word1 word2", "word3"), ("word4", "word5 word6"), ("word1 word2 word3", "word4")]
    (batch,) = answered_prompts(iter(pairs), words, 3, 9)
    first, end = words.convert_tokens_to_ids("word1"), words.eos_token_id
    assert batch["input_ids"].tolist() == [
        [first, first + 1, first + 2],
        [first + 3, first + 4, first + 5],
    ]  # the third leaves no room for an answer
    assert batch["labels"].tolist() == [[-100, -100, first + 2], [-100, first + 4, first + 5]]
    (longer,) = answered_prompts(iter(pairs[:2]), words, 9, 9)
    assert longer["labels"][0].tolist() == [-100, -100, first + 2, end]
    (unequal,) = answered_prompts(iter([pairs[0], ("word1", "word2")]), words, 9, 9)
    assert unequal["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert unequal["labels"][1].tolist() == [-100, first + 1, end, -100]


def test_covariances_are_handed_to_the_other_command(source: Path, tmp_path: Path, capsys) -> None:
    file, out = tmp_path / "covariances.safetensors", tmp_path / "out"
    given = [f"--model={source}", f"--data={source / 'data.jsonl'}", "--task=causal-lm"]
    small = ["--reduction=0.3", "--max_length=16", f"--covariances={file}", f"--output={out}"]
    main(["prune", *given, *small])
    assert f"--covariances {file}" in capsys.readouterr().out
    start = ["--device=cpu", "--r=2", "--corda_method=ipm", f"--covariances={file}"]
    corda.main(["init", f"--model={out}", *start, f"--output={tmp_path / 'adapter'}"])
    corda.main(["calibrate", f"--model={out}", *start, f"--output={tmp_path / 'f.safetensors'}"])
    factors = CordaFactors.load(tmp_path / "f.safetensors")
    config = CordaConfig(corda_method="ipm", r=2, target_modules="all-linear")
    model = AutoModelForCausalLM.from_pretrained(out)
    expected = calibrate(model, config, covariances=file, progress=False)
    assert list(factors.modules) == list(expected.modules)
    for name, module in expected.modules.items():
        assert factors.modules[name].tokens == module.tokens
        assert torch.equal(factors.modules[name].directions["ipm"].S, module.directions["ipm"].S)
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    found = {name for name, _ in adapted.named_parameters() if "q_proj.lora_A" in name}
    assert found


def test_sequences_are_as_long_as_the_model_allows(source: Path) -> None:
    about, words = tiny_decoder("llama").config, AutoTokenizer.from_pretrained(source)
    assert sequence_tokens(PruneOptions("m", "d", "o"), words, about) == 64
    assert sequence_tokens(PruneOptions("m", "d", "o", max_length=9), words, about) == 9
    with pytest.raises(ValueError, match="leaves no token to predict"):
        sequence_tokens(PruneOptions("m", "d", "o", max_length=1), words, about)


def test_options_reach_the_engine() -> None:
    options = PruneOptions(
        "m", "d", "o", layout="uniform", round_to=64, min_share=0.9, min_head_share=0.1
    )
    config = prune_config(options)
    assert (config.layout, config.round_to) == ("uniform", 64)
    assert (config.min_share, config.min_head_share, config.metric) == (0.9, 0.1, None)


def test_plan(source: Path, tmp_path: Path, capsys) -> None:
    (source / "model.safetensors").unlink()  # the config is enough
    command("plan", source, "--reduction=0.3", "--device=cpu", f"--json={tmp_path / 'plan.json'}")
    printed = capsys.readouterr().out
    assert "memory (cpu):" in printed and "passes through the layers" in printed
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["covariances"] > 0 and "file of covariances" in printed
    assert plan["peak"] == plan["weights"] + plan["beyond_model"] > 0
    parameters = tiny_decoder("llama", intermediate_size=200).num_parameters()
    assert 4 * parameters <= plan["weights"] <= 4 * parameters + 100  # and the rotary positions


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reduction=2"], "reduction=2.0 is outside"),
        (["--reduction=0.99999"], "cannot be reached"),
        (["--max_length=0"], "no number of tokens"),
        (["--device=nowhere"], "cannot be used here"),
    ],
)
def test_plans_with_mistakes(source: Path, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        command("plan", source, "--device=cpu", *more)
