"""Where results are written: nothing that is not ours is ever deleted or overwritten."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from kprune_ext import KPruneReport, LatencyTable
from kprune_ext import cli as kprune_cli
from kprune_ext.common.files import (
    check_distinct,
    check_output_file,
    check_output_folder,
    replacing,
    replacing_folder,
)
from kprune_ext.modeling.replacing_files import replacing_files
from peft_corda import CordaExportCallback, calibrate, cli, export_lora
from tests.helpers.corda import make_batches, make_config, make_model
from tests.helpers.text import SENTENCES, make_tokenizer

ROOT = Path(__file__).parents[2]
EMPTY = ["", " ", "\t"]
FIELDS = [field.name for field in dataclasses.fields(KPruneReport)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model with a tokenizer, data, factors and a trained adapter."""
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer().save_pretrained(folder / "llama")
    model, config = make_model("llama"), make_config()
    model.save_pretrained(folder / "llama")
    (folder / "data.txt").write_text("\n".join(SENTENCES))
    calibrate(model, config, make_batches(), verbose=False).save(folder / "factors.safetensors")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The current folder, with a user's work in it; it must be as it was at the end."""
    here = tmp_path / "project"
    (here / "thesis").mkdir(parents=True)
    (here / "thesis" / "chapter1.tex").write_text("years of work")
    (here / "data.csv").write_text("1")
    monkeypatch.chdir(here)
    before = contents(here)
    yield here
    assert contents(here) == before


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def init(made, output, **more):
    given = {
        "model": made / "llama", "factors": made / "factors.safetensors", "r": 4, "device": "cpu",
        "output": output,
    } | more  # fmt: skip
    return ["init", *(f"--{key}={value}" for key, value in given.items())]


def calibration(made, output, **more):
    given = {"model": made / "llama", "data": made / "data.txt", "output": output, **more}
    return ["calibrate", *(f"--{key}={value}" for key, value in given.items())]


def pruning(out, **more):
    given = {"model": "no-such-model", "data": "no-such.txt", "output": out, **more}
    return ["prune", *(f"--{key}={value}" for key, value in given.items())]


class TestAnEmptyPath:
    @pytest.mark.parametrize("path", EMPTY)
    def test_of_an_export(self, made, project, path):
        with pytest.raises(ValueError, match="dst is empty"):
            export_lora(made / "adapter", path)

    @pytest.mark.parametrize("path", EMPTY)
    def test_of_the_callback(self, project, path):
        with pytest.raises(ValueError, match="dst is empty"):
            CordaExportCallback(path)

    @pytest.mark.parametrize("path", EMPTY)
    def test_of_a_checkpoint_folder(self, project, path):
        with pytest.raises(ValueError, match="checkpoint_dir is empty"):
            calibrate(
                make_model("llama"),
                make_config(),
                make_batches(),
                checkpoint_dir=path,
                verbose=False,
            )

    @pytest.mark.parametrize("write", [replacing, replacing_folder, replacing_files])
    @pytest.mark.parametrize("path", EMPTY)
    def test_of_whatever_is_written(self, project, write, path):
        with pytest.raises(ValueError, match="is empty"), write(path):
            raise AssertionError("the block must not be entered")

    @pytest.mark.parametrize("path", EMPTY)
    def test_of_a_report_or_table(self, project, path):
        report = KPruneReport.from_dict({field: None for field in FIELDS} | {"sublayers": []})
        with pytest.raises(ValueError, match="is empty"):
            report.save_json(path)
        with pytest.raises(ValueError, match="is empty"):
            LatencyTable("cpu", 1, 8, {0: 0.0}, {0: 0.0}).save(path)

    def test_on_the_command_line(self, made, project, capsys):
        commands = {
            "dst": ["export", str(made / "adapter"), ""],
            "output": init(made, ""),
            "json": ["report", str(made / "factors.safetensors"), "--json", ""],
            "plot": ["report", str(made / "factors.safetensors"), "--plot="],
        }
        for name, command in commands.items():
            with pytest.raises(SystemExit, match=f"{name} is empty"):
                cli.main(command)
        with pytest.raises(SystemExit, match="output is empty"):
            cli.main(calibration(made, ""))
        with pytest.raises(SystemExit, match="json is empty"):
            cli.main(["plan", f"--model={made / 'llama'}", "--json="])
        with pytest.raises(SystemExit, match="output is empty"):
            kprune_cli.main(pruning(""))
        with pytest.raises(SystemExit, match="plot is empty"):
            kprune_cli.main(pruning("pruned", plot=""))
        with pytest.raises(SystemExit, match="json is empty"):
            kprune_cli.main(["report", "no-such-folder", "--json="])


class TestAFolderThatIsNotOurs:
    @pytest.mark.parametrize("path", [".", "..", "thesis/..", "missing/..", "/"])
    def test_the_current_one_or_one_above(self, made, project, path):
        with pytest.raises(ValueError, match="the current folder or one above it"):
            export_lora(made / "adapter", path)
        with pytest.raises(SystemExit, match="the current folder or one above it"):
            cli.main(init(made, path))
        with pytest.raises(SystemExit, match="the current folder or one above it"):
            kprune_cli.main(pruning(path))

    @pytest.mark.parametrize("path", ["thesis", "missing/../thesis", "link", "link/missing/.."])
    def test_whatever_name_it_goes_by(self, made, project, path, request):
        (project / "link").symlink_to("thesis")
        request.addfinalizer((project / "link").unlink)
        for write in (
            lambda: export_lora(made / "adapter", path),
            lambda: CordaExportCallback(path),
            lambda: cli.main(init(made, path)),
            lambda: kprune_cli.main(pruning(path)),
        ):
            with pytest.raises((ValueError, SystemExit), match=r"other files \(chapter1.tex\)"):
                write()
        assert (project / "thesis" / "chapter1.tex").read_text() == "years of work"

    def test_a_lora_that_was_trained(self, made, tmp_path):
        lora = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
        lora.save_pretrained(tmp_path / "lora")
        before = contents(tmp_path / "lora")
        with pytest.raises(ValueError, match="not an earlier export"):
            export_lora(made / "adapter", tmp_path / "lora")
        assert contents(tmp_path / "lora") == before

    def test_an_export_that_was_trained_further(self, made, tmp_path):
        from peft import PeftModel

        export_lora(made / "adapter", tmp_path / "lora")
        export_lora(made / "adapter", tmp_path / "lora")  # an untouched one is replaced
        further = PeftModel.from_pretrained(
            make_model("llama"), tmp_path / "lora", is_trainable=True
        )
        further.save_pretrained(tmp_path / "lora")
        with pytest.raises(ValueError, match="not an earlier export"):
            export_lora(made / "adapter", tmp_path / "lora")

    def test_a_readme_alone_is_kept(self, made, tmp_path):
        (tmp_path / "README.md").write_text("mine")
        with pytest.raises(ValueError, match="not an earlier export"):
            export_lora(made / "adapter", tmp_path)

    def test_a_folder_by_the_name_of_a_file_of_ours(self, made, tmp_path):
        export_lora(made / "adapter", tmp_path / "lora")
        (tmp_path / "lora" / "README.md").unlink()
        (tmp_path / "lora" / "README.md").mkdir()
        (tmp_path / "lora" / "README.md" / "mine").touch()
        with pytest.raises(ValueError, match=r"other files \(README.md\)"):
            export_lora(made / "adapter", tmp_path / "lora")
        assert (tmp_path / "lora" / "README.md" / "mine").exists()

    def test_a_file_that_came_meanwhile(self, tmp_path):
        with (
            pytest.raises(ValueError, match=r"other files \(late\)"),
            replacing_folder(tmp_path / "new", {"ours"}) as folder,
        ):
            open(os.path.join(folder, "ours"), "x").close()
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "late").touch()
        assert [path.name for path in tmp_path.rglob("*")] == ["new", "late"]

    def test_the_path_of_the_callback_holds_wherever_the_run_goes(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        callback = CordaExportCallback("lora")
        assert callback.dst == str(tmp_path / "lora")


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
        with pytest.raises(SystemExit, match="checkpoint_dir lies in the folder that output"):
            cli.main(init(made, "new", checkpoint_dir="new/parts"))

    def test_a_pruned_model(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match="plot lies in the folder that output"):
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


def test_files_deleted_are_those_named(tmp_path):
    """A folder with the given names only is replaced; nothing else is ever removed."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("earlier")
    with replacing_folder(target, {"old", "new"}) as folder:
        open(os.path.join(folder, "new"), "x").close()
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "new"]


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
    with pytest.raises(SystemExit, match=rf"`{option}` holds '\[', which is not a valid regular"):
        cli.main(init(made, tmp_path / "adapter", **{option: '{"[": 4}'}))
