"""The study of fine-tuning on a tiny model, and what is read off its runs."""

import json

import local_text
import pytest

from benchmarks.common.records import mean_and_error
from benchmarks.corda_training import finetune
from benchmarks.corda_training.tradeoff import (
    as_markdown,
    at_task_loss,
    best_rate,
    equal_task,
    steps_to,
)

SETTINGS = {
    "rank": 2, "steps": 4, "batch_size": 2, "max_length": 60, "calibration_windows": 4,
    "calibration_questions": 4, "task_examples": 4, "early_examples": 2, "questions": 4, "windows": 2,
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """The layout of the real data, with text made here."""

    def write(name, pairs):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
        path.write_text("\n".join(rows))

    write("gsm8k/train.jsonl", local_text.word_problems(40, 0))
    write("gsm8k/test.jsonl", local_text.word_problems(12, 1))
    facts = local_text.facts()
    write("nq_open/train.jsonl", facts[:20])
    write("nq_open/validation.jsonl", facts[20:40])
    for split in ("train", "test"):
        path = tmp_path / "data" / "wikitext2" / f"{split}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(" ".join(pair) for pair in facts) * 6)
    return tmp_path / "data"


def test_all_methods_run_and_the_report_grows(data, tiny_model, tmp_path):
    def call(*options):
        finetune.main(
            [
                *("--data", str(data), "--model", tiny_model, "--settings", json.dumps(SETTINGS)),
                *("--factors", str(tmp_path / "factors"), "--results", str(tmp_path / "results")),
                *("--rates", "1e-2", *options),
            ]
        )
        return json.loads((tmp_path / "results" / "corda_finetune.json").read_text())

    methods = ["lora", "pissa", "kpm", "ipm", "full", "kpm-sqrt", "sc_lora", "lora_null"]
    report = call("--methods", *methods)
    assert [run["method"] for run in report["runs"]] == methods
    assert all(run["task"] < report["before"]["task"] for run in report["runs"])
    assert all(list(run["curve"]) == ["1", "2", "3", "4"] for run in report["runs"])
    sizes = {run["trained_parameters"] for run in report["runs"] if run["method"] != "full"}
    assert len(sizes) == 1
    first = {run["method"]: run["losses"][0] for run in report["runs"]}
    exact = [first[method] for method in methods if method != "pissa"]
    assert max(exact) == min(exact)  # the first batch is the same, and so are the models

    report = call("--methods", "lora", "kpm", "--seeds", "0", "1")
    assert len(report["runs"]) == len(methods) + 2
    assert len(report["commands"]) == 2
    assert (tmp_path / "results" / "corda_finetune.png").stat().st_size > 0
    assert "kpm-sqrt" in (tmp_path / "results" / "corda_finetune.md").read_text()


def test_decay_pulls_to_the_base_and_validation_has_texts_of_its_own(data, tiny_model, tmp_path):
    settings = SETTINGS | {"task": "mbpp", "validation_examples": 3, "steps": 12, "questions": 3}
    rows = [
        json.dumps({"text": question, "code": f"{answer}\r\n"})
        for question, answer in local_text.word_problems(16, 0)
    ]
    for split in ("train", "test"):
        (data / "mbpp").mkdir(exist_ok=True)
        (data / "mbpp" / f"{split}.jsonl").write_text("\n".join(rows))
    given = [
        *("--data", str(data), "--model", tiny_model, "--settings", json.dumps(settings)),
        *("--factors", str(tmp_path / "factors"), "--results", str(tmp_path / "results")),
        *("--rates", "1e-2", "--methods", "kpm", "kpm+decay", "kpm+knowledge", "lora+knowledge"),
        *("--strengths", "30"),
    ]
    finetune.main(given)
    report = json.loads((tmp_path / "results" / "corda_finetune.json").read_text())
    runs = {run["method"]: run for run in report["runs"]}
    assert len(runs) == 4
    for method in ("kpm+decay", "kpm+knowledge"):
        assert runs[method]["strength"] == 30
        assert runs[method]["forgetting"] < 0.8 * runs["kpm"]["forgetting"]
    assert all(set(run["validation"]) == {"task", "nq", "wikitext"} for run in runs.values())
    assert "kpm+knowledge" in (tmp_path / "results" / "corda_finetune.md").read_text()


def point(rate, task, wikitext=0.0, seed=0, method="kpm"):
    curve = {"2": 2.0, "4": task}
    return {
        "method": method, "rate": rate, "seed": seed, "task": task, "wikitext": wikitext, "nq": wikitext,
        "curve": curve,
    }  # fmt: skip


def test_curves_are_read_between_their_points():
    points = [point(1e-4, 2.0, 0.1), point(1e-3, 1.0, 0.3), point(1e-2, 1.2, 0.9)]
    assert at_task_loss(points, 1.5, "wikitext") == pytest.approx(0.2)
    assert at_task_loss(points, 1.0, "wikitext") == pytest.approx(0.3)
    assert at_task_loss(points, 0.9, "wikitext") is None
    assert at_task_loss(points, 2.5, "wikitext") is None
    assert best_rate(points) == 1e-3


def test_steps_are_read_between_measurements():
    curve = {"10": 2.0, "20": 1.0, "30": 1.5}
    assert steps_to(curve, 4.0, 3.0) == pytest.approx(5.0)
    assert steps_to(curve, 4.0, 1.5) == pytest.approx(15.0)
    assert steps_to(curve, 4.0, 0.5) is None


def test_means_have_an_error_only_with_several_values():
    assert mean_and_error([1.0, 3.0]) == "2.00 ± 1.00"
    assert (mean_and_error([1.0]), mean_and_error([])) == ("1.00", "–")


def test_knowledge_is_compared_at_the_same_task_loss_seed_by_seed():
    runs = [
        run
        for seed, off in ((0, 0.0), (1, 0.2))
        for run in (
            point(1e-4, 2.0 + off, 0.1, seed, "lora"),
            point(1e-3, 1.0 + off, 0.3, seed, "lora"),
            point(1e-2, 1.5 + off, 0.9, seed, "lora"),
            point(1e-4, 1.5 + off, 0.1, seed),
            point(1e-3, 1.6 + off, 0.7, seed),  # higher than its best rate
            point(1e-4, 0.9 + off, 0.1, seed, "ipm"),  # LoRA is never as good
        )
    ]
    before = {"task": 3.0, "wikitext": 0.0, "nq": 0.0, "early": 3.0}
    settings = {"dtype": "float32", "steps": 4, "batch_size": 2, "rank": 2, "early_examples": 2}
    report = {
        "runs": runs,
        "before": before,
        "settings": settings,
        "model": "tiny",
        "commands": ["x"],
    }
    (line,) = equal_task(report).splitlines()[2:]
    found = "0.100 ± 0.000 | 0.200 ± 0.000 | -0.100 ± 0.000"
    assert line == f"| kpm | 0.0001 | 2 | {found} | {found} |"
    assert "3.02 ± 0.30" in as_markdown(report)
