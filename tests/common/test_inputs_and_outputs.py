"""Destinations are checked before the work, against the inputs and against each other."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kprune_ext import cli as kprune_cli
from kprune_ext.files.writing import check_distinct, check_output_file, check_output_folder
from peft_corda import cli
from tests.helpers.destinations import calibration, contents, init, pruning

ROOT = Path(__file__).parents[2]


class TestOutputsAndInputs:
    def test_a_report_over_its_factors(self, made, tmp_path, monkeypatch):
        factors = made / "factors.safetensors"
        before = factors.read_bytes()
        (tmp_path / "link.json").symlink_to(factors)
        os.link(factors, tmp_path / "hard.json")
        for path in (factors, made / "llama" / ".." / factors.name, "link.json", "hard.json"):
            for option in ("json", "plot"):
                with pytest.raises(SystemExit, match=f"{option} and factors are both"):
                    monkeypatch.chdir(tmp_path)
                    cli.main(["report", str(factors), f"--{option}={path}"])
        assert factors.read_bytes() == before

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"output": "data.txt"}, "output and data"),
            ({"report": "data.txt"}, "report and data"),
            ({"output": "one", "report": "one"}, "output and report"),
            ({"output": "llama"}, "is a folder; give the path of the file"),
            ({"output": "one", "report": "sub/../one"}, "output and report"),
        ],
    )
    def test_a_calibration(self, made, monkeypatch, options, message):
        monkeypatch.chdir(made)
        before = contents(made)
        with pytest.raises(SystemExit, match=message):
            cli.main(calibration(made, **{"output": "new", **options}))
        assert contents(made) == before

    def test_an_adapter(self, made, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match="checkpoint_dir lies in the folder output"):
            cli.main(init(made, "new", checkpoint_dir="new/parts"))

    def test_a_pruned_model(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match="plot lies in the folder output"):
            kprune_cli.main(pruning("new", plot="new/kept.png"))
        with pytest.raises(SystemExit, match="output and model are both"):
            kprune_cli.main(pruning("no-such-model"))
        with pytest.raises(SystemExit, match="plot and data are both"):
            kprune_cli.main(pruning("new", plot="no-such.txt"))

    def test_a_plan(self, made):
        about = made / "llama" / "config.json"
        before = about.read_bytes()
        with pytest.raises(SystemExit, match="json and model are both"):
            cli.main(["plan", f"--model={about}", f"--json={about}"])
        assert about.read_bytes() == before

    def test_a_report_of_a_pruned_model(self, tmp_path):
        stored = tmp_path / "kprune_report.json"
        stored.write_text(json.dumps({}))
        with pytest.raises(SystemExit, match="json and source are both"):
            kprune_cli.main(["report", str(tmp_path), f"--json={stored}"])
        assert stored.read_text() == "{}"

    def test_names_on_a_hub_are_no_paths(self):
        check_distinct({"output": "new"}, {"model": "org/name", "data": None})


class TestFoundBeforeTheWork:
    """The model is not even loaded: its folder does not exist."""

    @pytest.mark.parametrize("path", ["file/new", "file/deeper/new", "/proc/new/deeper"])
    def test_where_nothing_can_be_written(self, tmp_path, monkeypatch, path):
        (tmp_path / "file").touch()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(OSError, match="Cannot write path="):
            check_output_file(path)
        with pytest.raises(OSError, match="Cannot write path="):
            check_output_folder(path)
        for main, command, name in (
            (
                cli.main,
                ["calibrate", "--model=none", "--data=none.txt", f"--output={path}"],
                "output",
            ),
            (
                cli.main,
                ["calibrate", "--model=none", "--data=none.txt", "--output=f", f"--report={path}"],
                "report",
            ),
            (cli.main, ["init", "--model=none", "--data=none.txt", f"--output={path}"], "output"),
            (kprune_cli.main, pruning(path), "output"),
            (kprune_cli.main, pruning("new", plot=path), "plot"),
        ):
            with pytest.raises(SystemExit, match=f"Cannot write {name}="):
                main(command)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]

    @pytest.mark.parametrize("path", ["folder", "new/"])
    def test_a_folder_for_a_file(self, tmp_path, monkeypatch, path):
        (tmp_path / "folder").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="is a folder; give the path of the file"):
            check_output_file(path)

    def test_nothing_is_left_by_the_check(self, tmp_path):
        check_output_file(tmp_path / "new" / "file")
        check_output_folder(tmp_path / "new" / "folder")
        assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_in_a_line(made, tmp_path):
    """Files of more than 8 blocks cannot be written; nothing is left of those that were begun."""
    command = " ".join(shlex.quote(part) for part in init(made, "adapter"))
    limited = f"ulimit -f 8; trap '' XFSZ; exec {sys.executable} -m peft_corda {command}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", limited], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "peft-corda init: error: " in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_expression(made, tmp_path, option):
    with pytest.raises(
        SystemExit, match=rf"`{option}` has the key '\[', which is not a valid regular"
    ):
        cli.main(init(made, tmp_path / "adapter", **{option: '{"[": 4}'}))
