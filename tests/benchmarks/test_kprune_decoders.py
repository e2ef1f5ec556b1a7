"""The study of decoders in a tiny setting: its texts, its scores, its runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.common.models import load_model, load_tokenizer
from benchmarks.kprune import decoder_data as texts_of
from benchmarks.kprune import decoders
from benchmarks.kprune.decoder_runs import METHODS
from benchmarks.kprune.decoder_scores import latency, nats
from benchmarks.kprune.decoder_tables import SCORES


def paragraph(words: list[str], number: int, length: int) -> str:
    return " ".join(words[(7 * number + 3 * step) % len(words)] for step in range(length))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Path:
    """A tiny model with four key-value groups of two query heads, in a folder."""
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    config = LlamaForCausalLM.from_pretrained(tiny_model).config
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 4, 4
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """All files that the study reads, made of words that the tokenizer knows."""
    folder = tmp_path_factory.mktemp("data")
    known = AutoTokenizer.from_pretrained(model).get_vocab()
    words = sorted(word for word in known if word.isalpha())
    for name in ("wikitext2", "c4_sample", "nq_open", "gsm8k"):
        (folder / name).mkdir()
    for split in ("train", "test"):
        text = "\n\n".join(paragraph(words, number, 40) for number in range(60))
        (folder / "wikitext2" / f"{split}.txt").write_text(text)
    rows = [json.dumps({"text": paragraph(words, number, 30)}) for number in range(60)]
    (folder / "c4_sample" / "train.jsonl").write_text("\n".join(rows))
    for name, splits in (("nq_open", ("train", "validation")), ("gsm8k", ("train", "test"))):
        for split in splits:
            rows = []
            for number in range(40):
                question, answer = (paragraph(words, number + k, 4 + number % 5) for k in (0, 99))
                whole = [answer, "another"] if name == "nq_open" else answer
                rows.append(json.dumps({"question": question, "answer": whole}))
            (folder / name / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def call(data: Path, model: Path, results: Path, *more: str) -> dict:
    given = ["--data", str(data), "--model", str(model), "--results", str(results)]
    given += ["--in-process", "--tokens", "400", "--length", "16", "--windows", "6"]
    given += ["--questions", "5", "--rounds", "1", "--reductions", "0.3", "--seeds", "0"]
    decoders.main([*given, *more])
    return json.loads((results / "kprune_decoders.json").read_text())


def test_every_method_runs_and_a_second_call_does_nothing(
    data: Path, model: Path, tmp_path: Path
) -> None:
    every = ["--calibrations", "wikitext2", "mixture"]
    report = call(data, model, tmp_path, *every)
    assert len(report["runs"]) == 1 + 2 * len(METHODS) - 1  # magnitude reads no text
    for run in report["runs"]:
        assert all(math.isfinite(run["scores"][name]) for name in SCORES)
        if run["method"] != "dense":
            assert 0.5 < run["params_kept"] <= 0.7 + 1e-9
            assert len(run["layers"]) == 2
        if run["method"] == "uniform":
            assert run["layers"][0] == run["layers"][1]
        if run["method"] in ("ours", "uniform", "flap_tuned"):
            assert run["latency"]["decode"]["speedup"] > 0
    text = (tmp_path / "kprune_decoders.md").read_text()
    assert "| mixture | 400 | 30% | local_refit |" in text
    assert str(tmp_path) not in text and str(data) not in text
    assert (tmp_path / "kprune_decoders.png").stat().st_size > 1000
    before = (tmp_path / "kprune_decoders.json").read_bytes()
    call(data, model, tmp_path, *every)
    assert (tmp_path / "kprune_decoders.json").read_bytes() == before


def test_other_settings_are_other_runs(data: Path, model: Path, tmp_path: Path) -> None:
    fixed = ["--methods", "ours", "--calibrations", "c4"]
    call(data, model, tmp_path, *fixed)
    report = call(data, model, tmp_path, *fixed, "--options", '{"min_share": 0.9}')
    assert [run["method"] for run in report["runs"]] == ["dense", "ours", "ours"]
    assert "ours min_share=0.9" in (tmp_path / "kprune_decoders.md").read_text()
    report = call(data, model, tmp_path, *fixed, "--seeds", "0", "1")
    assert [run["seed"] for run in report["runs"]] == [0, 0, 0, 1]


def test_results_of_processes_beside_one_another_are_joined(
    data: Path, model: Path, tmp_path: Path
) -> None:
    parts = []
    for number, method in enumerate(("flap", "wanda_sp")):
        call(data, model, tmp_path / str(number), "--methods", method, "--calibrations", "c4")
        parts.append(str(tmp_path / str(number) / "kprune_decoders.json"))
    both = ["--methods", "flap", "wanda_sp", "--calibrations", "c4"]
    report = call(data, model, tmp_path, *both, "--add", *parts, parts[0])
    assert [run["method"] for run in report["runs"]] == ["dense", "flap", "wanda_sp"]
    assert len(report["commands"]) == 2


def test_nats_are_those_of_single_samples(data: Path, model: Path) -> None:
    found, tokenizer = load_model(str(model), torch.float32), load_tokenizer(str(model))
    texts = texts_of.Texts(data, tokenizer)
    samples = texts_of.answered(texts, "nq_open", "validation", 9)
    batches = texts_of.batches_of(samples, 64, tokenizer.pad_token_id)
    assert len(batches) > 1
    total, count = 0.0, 0
    for ids, labels in samples:
        with torch.no_grad():
            chances = found.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, label in enumerate(labels):
            if label != texts_of.IGNORED:
                total, count = total - float(chances[place - 1, label]), count + 1
    assert nats(found, batches) == (pytest.approx(total / count, rel=1e-6), count)


def test_samples_fit_the_budget_and_depend_on_the_seed(data: Path, model: Path) -> None:
    texts = texts_of.Texts(data, load_tokenizer(str(model)), 16)
    for name in texts_of.CALIBRATIONS:
        one, other, again = (texts_of.calibration(texts, name, 300, seed) for seed in (0, 1, 0))
        assert one == again != other
        assert 200 < sum(len(ids) for ids, _ in one) <= 300
    mixed = texts_of.calibration(texts, "mixture", 300, 0)
    asked = [labels for _, labels in mixed if texts_of.IGNORED in labels]
    assert 0 < len(asked) < len(mixed)
    for ids, labels in mixed:
        assert all(
            label in (token, texts_of.IGNORED) for token, label in zip(ids, labels, strict=True)
        )
        assert labels[-1] == ids[-1]


def test_held_out_text_is_not_calibrated_on(data: Path, model: Path) -> None:
    texts = texts_of.Texts(data, load_tokenizer(str(model)), 16)
    one, other = (texts_of.windows(texts, "c4", split) for split in ("train", "test"))
    assert len(one) > len(other) > 0
    rows = [json.loads(line)["text"] for line in (data / "c4_sample/train.jsonl").open()]
    first = texts.tokenizer(rows[40], add_special_tokens=False).input_ids[:16]
    assert other[0].tolist() == first


def test_a_missing_file_is_named(data: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="There is no file .*test.txt. Pass the folder"):
        call(tmp_path, model, tmp_path / "results")


def test_latencies_are_of_both_models(model: Path) -> None:
    found = load_model(str(model), torch.float32)
    measured = latency(found, found, 2, 8)
    for name in ("prefill", "decode"):
        assert measured[name]["dense"] > 0
        ratio = measured[name]["dense"] / measured[name]["pruned"]
        assert measured[name]["speedup"] == pytest.approx(ratio)
