"""The K-prune benchmark in a tiny setting, and its parts against hand-made answers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import corda_encoder
import kprune_accuracy
import kprune_cost
import kprune_export
import kprune_logits
import kprune_recovery
import kprune_tasks
import pytest
import torch
from kprune_baselines import unit_factors
from kprune_helpers import VOCABULARY, word_tokenizer
from transformers import BertConfig, BertForMaskedLM

from kprune_ext.tuning.least_squares import NormalEquations


def sentence(generator: torch.Generator) -> str:
    return " ".join(f"word{n}" for n in torch.randint(0, 50, (6,), generator=generator))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four data sets in the benchmark's format, and a tiny model with its tokenizer."""
    generator = torch.Generator().manual_seed(0)
    for name in kprune_tasks.TASKS:
        for split, count in (("train", 40), ("validation", 12), ("test", 12)):
            if (name, split) == ("squad", "test"):
                continue
            rows = []
            for number in range(count):
                pair = [sentence(generator), sentence(generator)]
                rows.append(
                    {
                        "sst2": {"sentence": pair[0], "label": number % 2},
                        "mrpc": {
                            "sentence1": pair[0],
                            "sentence2": pair[1],
                            "label": number % 2,
                        },
                        "stsb": {
                            "sentence1": pair[0],
                            "sentence2": pair[1],
                            "score": number % 6,
                        },
                        "squad": {
                            "question": pair[0],
                            "context": pair[1],
                            "answers": {"text": [pair[1].split()[0]], "answer_start": [0]},
                        },
                    }[name]
                )
            (tmp_path / name).mkdir(exist_ok=True)
            path = tmp_path / name / f"{split}.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "model").mkdir()
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=60,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    word_tokenizer(tmp_path / "model").save_pretrained(tmp_path / "model")
    return tmp_path


def call(data: Path, *more: str) -> dict:
    folders = {"data": data, "checkpoints": data / "fine", "model": data / "model"}
    arguments = [text for name, path in folders.items() for text in (f"--{name}", str(path))]
    fixed = ["--in-process", "--epochs=1", "--tokens=150", "--rounds=1", "--reductions", "0.5"]
    results = data / "results"
    kprune_accuracy.main([*arguments, *fixed, "--results", str(results), *more])
    return json.loads((results / "kprune_accuracy.json").read_text())


def test_every_task_and_method_runs_and_a_second_call_does_nothing(data: Path) -> None:
    names = list(kprune_tasks.TASKS)
    report = call(data, "--seeds", "0", "--tasks", *names)
    assert len(report["runs"]) == 4 * (1 + 4)
    for run in report["runs"]:
        lowest = -100 if run["task"] == "stsb" else 0
        assert lowest <= run[kprune_tasks.TASKS[run["task"]].main] <= 100
        if run["method"] != "dense":
            assert 0.4 < run["flops_kept"] <= 0.5
            assert run["latency_32"]["speedup"] > 0
    text = (data / "results" / "kprune_accuracy.md").read_text()
    assert "fisher_mask" in text and "| squad |" in text
    assert str(data) not in text
    assert (data / "results" / "kprune_accuracy.png").stat().st_size > 1000
    before = (data / "results" / "kprune_accuracy.json").read_bytes()
    call(data, "--seeds", "0", "--tasks", *names)
    assert (data / "results" / "kprune_accuracy.json").read_bytes() == before


def test_runs_that_are_missing_are_added(data: Path) -> None:
    call(data, "--seeds", "0", "--tasks", "sst2", "--methods", "ours")
    report = call(data, "--seeds", "0", "1", "--tasks", "sst2", "--methods", "ours")
    assert [run["seed"] for run in report["runs"]] == [0, 0, 1]
    assert "±" in (data / "results" / "kprune_accuracy.md").read_text().splitlines()[-1]


def test_what_a_factor_on_the_logits_does(data: Path) -> None:
    folders = {"data": data, "checkpoints": data / "fine", "model": data / "model"}
    arguments = [text for name, path in folders.items() for text in (f"--{name}", str(path))]
    arguments += ["--epochs=1", "--tokens", "150", "--reduction=0.5", "--results", str(data / "r")]
    kprune_logits.main([*arguments, "--task=mrpc", "--seeds", "0", "1"])
    path = data / "r" / "kprune_logits.json"
    before = path.read_bytes()
    for run in json.loads(before)["runs"]:
        one, other = run["with"], run["without"]
        assert one["f1"] == other["f1"] and one["agreement"] == other["agreement"]
        assert run["scale"] > 0 and run["dense"]["divergence"] == 0
    kprune_logits.main([*arguments, "--task=mrpc", "--seeds", "0", "1"])
    assert path.read_bytes() == before
    row = (data / "r" / "kprune_logits.md").read_text().splitlines()[-1]
    assert row.startswith("| mrpc, 50% | 150 | 2 |") and "±" in row


def test_predictions_compared() -> None:
    dense = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    rows = [{"label": 0}, {"label": 0}]
    found = kprune_logits.compared(dense.flip(1), dense, rows, kprune_tasks.TASKS["mrpc"])
    assert found["agreement"] == 0 and found["accuracy"] == 50
    # KL between (p, 1 - p) and its reverse is (2 p - 1) times the difference of the logits
    expected = [(2 / (1 + math.exp(-gap)) - 1) * gap for gap in (2, 1)]
    assert found["divergence"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    loss = [math.log(1 + math.exp(2)), math.log(1 + math.exp(-1))]
    assert found["loss"] == pytest.approx(sum(loss) / 2, rel=1e-5)


def test_metrics() -> None:
    accuracy = kprune_tasks._accuracy_f1(
        [torch.tensor(z) for z in ([0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0])],
        [{"label": label} for label in (1, 0, 0, 1)],
    )
    assert accuracy == {"accuracy": 50.0, "f1": 50.0}
    rows = [{"score": score} for score in (1.0, 2.0, 2.0, 5.0)]
    values = [torch.tensor([value]) for value in (0.1, 0.2, 0.2, 0.9)]
    assert kprune_tasks._spearman(values, rows)["spearman"] == pytest.approx(100)
    assert kprune_tasks._spearman(values[::-1], rows)["spearman"] == pytest.approx(-100)
    wanted = [{"answers": {"text": ["the Eiffel tower", "tower"]}}, {"answers": {"text": ["x"]}}]
    found = kprune_tasks._answers(["Eiffel Tower!", "y"], wanted)
    assert found == {"f1": 50.0, "exact_match": 50.0}


@pytest.mark.parametrize("unit_size", [1, 3])
def test_factors_of_units_are_least_squares(unit_size: int) -> None:
    units, tokens = 4, 500
    features = torch.randn(tokens, units * unit_size).double()
    weight = torch.randn(6, units * unit_size).double()
    factors = torch.tensor([0.5, 2.0, -1.0, 3.0]).double()
    targets = features @ (weight * factors.repeat_interleave(unit_size)).T
    equations = NormalEquations.zeros(units * unit_size, 6)
    equations.update(features, targets)
    torch.testing.assert_close(
        unit_factors(equations, weight, unit_size), factors, rtol=0.01, atol=0.01
    )


def recover(data: Path, *more: str) -> dict:
    folders = {"data": data, "checkpoints": data / "fine", "model": data / "model"}
    arguments = [text for name, path in folders.items() for text in (f"--{name}", str(path))]
    results = data / "results"
    fixed = ["--tokens=150", "--rank=2", "--rounds=1", "--epochs=1", "--reductions", "0.5"]
    kprune_recovery.main([*arguments, *fixed, "--results", str(results), *more])
    return json.loads((results / "kprune_recovery.json").read_text())


def test_recovery_trains_each_adapter_and_goes_on(data: Path) -> None:
    report = recover(data, "--rates", "1e-3", "--after", "none", "corda")
    assert [run["after"] for run in report["runs"]] == ["none", "none", "corda"]
    pruned, adapted = report["runs"][1:]
    assert adapted["parameters"] == pruned["parameters"] and adapted["trained"] > 0
    more = recover(data, "--rates", "1e-3", "--after", "none", "corda", "lora")
    assert more["runs"][:3] == report["runs"] and more["runs"][3]["after"] == "lora"
    assert more["runs"][3]["trained"] == adapted["trained"]


def test_recovery_refuses_results_of_another_study(data: Path) -> None:
    recover(data, "--after", "none")
    with pytest.raises(SystemExit, match="of another study"):
        recover(data, "--after", "none", "--adapter-epochs", "2")


def test_the_rate_is_chosen_by_validation_not_by_test() -> None:
    run = {"reduction": 0.6, "after": "lora", "seed": 0}
    runs = [run | {"rate": 1.0, "validation": 80.0, "test": 99.0}]
    runs += [run | {"rate": 2.0, "validation": 81.0, "test": 10.0, "seed": s} for s in (0, 1)]
    assert kprune_recovery.best_rates(runs) == [runs[1:]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_costs_of_the_papers_way_and_of_each_default(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"data": data, "checkpoints": data / "fine", "model": data / "model"}
    arguments = [text for name, path in folders.items() for text in (f"--{name}", str(path))]
    arguments += [
        "--tokens=150",
        "--epochs=1",
        "--reduction=0.5",
        "--results",
        str(data / "results"),
    ]

    def in_this_process(script: str, given: list[str], name: str) -> dict:
        kprune_cost.main([*given, "--one", name])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(kprune_cost, "in_child", in_this_process)
    kprune_cost.main(arguments)
    report = json.loads((data / "results" / "kprune_cost.json").read_text())
    forward, paper, once, fewer, default = report["runs"]
    assert forward["tokens"] == paper["tokens"] == default["tokens"] <= 150
    assert paper["options"]["schedule"] == "per_sublayer" and once["options"]["ridge"] == 0
    assert fewer["options"]["score_fraction"] == default["options"]["score_fraction"] < 1
    assert default["options"]["ridge"] is None
    text = (data / "results" / "kprune_cost.md").read_text()
    assert "| paper | " in text and "One forward pass" in text and str(data) not in text


def test_exported_models_are_timed(data: Path) -> None:
    folders = {"data": data, "checkpoints": data / "fine", "model": data / "model"}
    arguments = [text for name, path in folders.items() for text in (f"--{name}", str(path))]
    arguments += ["--tokens=150", "--rounds=1", "--epochs=1", "--reductions", "0.5"]
    kprune_export.main([*arguments, "--results", str(data / "results")])
    report = json.loads((data / "results" / "kprune_export.json").read_text())
    assert [(run["batch"], run["tokens"]) for run in report["runs"]] == [(32, 64), (1, 64)]
    for run in report["runs"]:
        assert run["logits_apart"] < 1e-4
        assert kprune_export.speedup(run["onnxruntime"]) > 0


def test_encoder_study_sweeps_and_measures_the_best_rate(data: Path) -> None:
    folders = ["--data", str(data), "--model", str(data / "model")]
    results = data / "results"

    def call(*more: str) -> dict:
        settings = json.dumps({"rank": 2, "examples": 40, "calibration_examples": 16})
        fixed = ["--settings", settings, "--threads", "1", "--results", str(results)]
        corda_encoder.main([*folders, *fixed, *more])
        return json.loads((results / "corda_encoder.json").read_text())

    report = call("--tasks", "sst2", "--rates", "1e-3", "1e-2", "--seeds", "0", "1")
    assert len(report["runs"]) == 4 * 3
    for method in corda_encoder.RATES:
        own = [run for run in report["runs"] if run["method"] == method]
        best = max(own[:2], key=lambda run: run["validation"]["accuracy"])
        measured = [run for run in own if "test" in run]
        assert [run["seed"] for run in measured] == [0, 1]
        assert {run["rate"] for run in measured} == {best["rate"]}
    sizes = {run["trained"] for run in report["runs"] if run["method"] != "full"}
    assert len(sizes) == 1
    assert call("--tasks", "sst2")["runs"] == report["runs"]
    text = (results / "corda_encoder.md").read_text()
    assert "| sst2 | accuracy | ipm |" in text and str(data) not in text
    assert (results / "corda_encoder.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="of other settings"):
        corda_encoder.main([*folders, "--results", str(results)])


def test_encoder_study_goes_on_until_the_best_rate_has_worse_ones_on_both_sides(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, method: str, rate: float, seed: int, args: object) -> tuple:
        value = {"accuracy": -abs(rate - 6e-3)}
        return {"task": name, "rate": rate, "seed": seed, "validation": value}, rate

    monkeypatch.setattr(corda_encoder, "run", run)
    monkeypatch.setattr(
        corda_encoder, "with_test", lambda record, model, args: record | {"test": model}
    )
    args = corda_encoder.arguments(["--data", str(data), "--seeds", "0", "1"])
    records = corda_encoder.swept("sst2", "full", args)
    swept = [record["rate"] for record in records if record["seed"] == 0]
    assert swept == [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3]  # at most six
    assert [r["test"] for r in records if "test" in r] == [3.2e-3] * 2
    assert [r["rate"] for r in corda_encoder.swept("sst2", "lora", args) if r["seed"] == 0] == [
        1e-3, 2e-3, 4e-3, 8e-3,
    ]  # fmt: skip
