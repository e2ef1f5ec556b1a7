"""Where results are written: nothing that is not ours is ever deleted or overwritten."""

import dataclasses
import os

import pytest
from peft import LoraConfig, get_peft_model

from kprune_ext import KPruneReport, LatencyTable
from kprune_ext import cli as kprune_cli
from kprune_ext.checkpoint_files.replacing_files import replacing_files
from kprune_ext.files.writing import replacing, replacing_folder
from peft_corda import CordaExportCallback, calibrate, cli, export_lora
from tests.helpers.corda import make_batches, make_config, make_model
from tests.helpers.destinations import calibration, contents, init, pruning

EMPTY = ["", " ", "\t"]
FIELDS = [field.name for field in dataclasses.fields(KPruneReport)]


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
        report = KPruneReport(**dict.fromkeys(FIELDS, 0) | {"sublayers": ()})
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


def test_files_deleted_are_those_named(tmp_path):
    """A folder with the given names only is replaced; nothing else is ever removed."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("earlier")
    with replacing_folder(target, {"old", "new"}) as folder:
        open(os.path.join(folder, "new"), "x").close()
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "new"]
