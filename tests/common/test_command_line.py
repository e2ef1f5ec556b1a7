"""Options have one name in both programs, and their earlier names still work."""

import io
from contextlib import redirect_stdout

import pytest
import yaml

import kprune_ext.cli
import peft_corda.cli
from kprune_ext.common.command_line import PEFT_TASKS, TASKS

PRUNE = ["prune", "--model=org/name", "--data=texts.jsonl"]
CALIBRATE = ["calibrate", "--model=org/name", "--data=texts.jsonl", "--output=factors"]


def options_of(main, *args):
    """What a program takes its arguments for."""
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        main([*args, "--print_config"])
    assert not stopped.value.code
    return yaml.safe_load(printed.getvalue())


@pytest.mark.parametrize("given", [["--output=a"], ["--out=a"], ["--out", "a"], ["--output", "a"]])
def test_the_output_of_pruning(given):
    assert options_of(kprune_ext.cli.main, *PRUNE, *given)["output"] == "a"


@pytest.mark.parametrize("content", ["out: a\nreduction: 0.7\n", "output: a\nreduction: 0.7\n"])
def test_the_output_of_pruning_in_a_file(tmp_path, content):
    (tmp_path / "prune.yaml").write_text(content)
    for given in (
        [f"--config={tmp_path / 'prune.yaml'}"],
        ["--config", str(tmp_path / "prune.yaml")],
    ):
        found = options_of(kprune_ext.cli.main, "prune", *given, *PRUNE[1:])
        assert (found["output"], found["reduction"]) == ("a", 0.7)


@pytest.mark.parametrize(
    ("earlier", "task"),
    [
        (earlier, task)
        for earlier, task in PEFT_TASKS.items()
        if task not in ("masked-lm", "image-classification")
    ],
)
def test_tasks_have_one_name_and_pefts(tmp_path, earlier, task):
    for name in (earlier, task):
        assert options_of(peft_corda.cli.main, *CALIBRATE, "--task", name)["task"] == task
        (tmp_path / "plan.yaml").write_text(f"model: org/name\ntask: {name}\n")
        found = options_of(peft_corda.cli.main, "plan", f"--config={tmp_path / 'plan.yaml'}")
        assert found["task"] == task
    if task not in ("causal-lm", "seq2seq-lm"):
        for name in (earlier, task):
            found = options_of(kprune_ext.cli.main, *PRUNE, "--output=a", f"--task={name}")
            assert found["task"] == task


def test_every_task_is_an_auto_class_of_transformers():
    import transformers

    assert all(hasattr(transformers, name) for name in TASKS.values())
    assert set(PEFT_TASKS.values()) <= set(TASKS)


@pytest.mark.parametrize("main", [kprune_ext.cli.main, peft_corda.cli.main])
@pytest.mark.parametrize("name", ["device-map", "device_map"])
def test_dashes_are_underscores(main, name):
    command = PRUNE if main is kprune_ext.cli.main else CALIBRATE
    found = options_of(main, *command, "--output=a", f"--{name}=auto", "--max-length", "64")
    assert (found["device_map"], found["max_length"]) == ("auto", 64)


@pytest.mark.parametrize("main", [kprune_ext.cli.main, peft_corda.cli.main])
def test_device_or_device_map(main, tmp_path):
    command = PRUNE if main is kprune_ext.cli.main else CALIBRATE
    with pytest.raises(SystemExit, match="either device or device_map"):
        main([*command, f"--output={tmp_path / 'new'}", "--device=cpu", "--device-map=auto"])
