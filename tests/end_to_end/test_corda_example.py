"""`corda_language_model.py` on a tiny model of the user's own, with built-in and own data."""

import json

import corda_language_model
import local_text
import pytest


def run(capsys, tiny_model, tmp_path, *options):
    settings = {
        "model": tiny_model, "dtype": "float32", "rank": 4, "steps": 3, "learning-rate": 1e-2,
        "calibration-samples": 16, "test-samples": 8, "output": tmp_path / "out",
    }  # fmt: skip
    flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    corda_language_model.main([*flags, *options])
    return capsys.readouterr().out


def test_on_the_built_in_data(capsys, tiny_model, tmp_path):
    out = run(capsys, tiny_model, tmp_path)
    table = out[out.rindex("Perplexity, lower is better") :].splitlines()[1:]
    rows = {line.split()[0]: [float(value) for value in line.split()[1:]] for line in table}
    assert rows.keys() == {"before", "lora", "kpm", "ipm"}
    assert all(rows[method][1] < rows["before"][1] for method in ("lora", "kpm", "ipm"))
    assert out.count("logits equal") == 2


def test_on_files_of_the_user(capsys, tiny_model, tmp_path):
    questions = [{"question": q, "answer": a} for q, a in local_text.word_problems(40, 3)]
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(map(json.dumps, questions)))
    knowledge = tmp_path / "knowledge.txt"
    knowledge.write_text("\n".join(answer for _, answer in local_text.facts()[:40]))
    out = run(
        capsys, tiny_model, tmp_path, "--methods", "kpm", "--task", str(task),
        "--knowledge", str(knowledge),
    )  # fmt: skip
    assert "logits equal" in out and "before" in out


def test_unusable_columns_are_named(tiny_model, tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"words": "a"}))
    with pytest.raises(SystemExit, match=r"has columns \['words'\]; need question/answer"):
        run(capsys, tiny_model, tmp_path, "--task", str(path))
