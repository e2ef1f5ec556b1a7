"""Checkpoints, arguments and destinations that an export refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_corda import export_lora
from tests.helpers.export import config_of, saved


def drop_start(folder):
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "start_A" not in k}, path)


def drop_all(folder):
    save_file({"head.weight": torch.ones(2)}, folder / "adapter_model.safetensors")


def break_values(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(v for k, v in tensors.items() if "lora_B.weight" in k)[0, 0] = float("nan")
    save_file(tensors, path)


def reshape_one(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "lora_start_B" in k)
    tensors[key] = tensors[key][:, :5].contiguous()
    save_file(tensors, path)


def change_config(**changes):
    def change(folder):
        (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | changes))

    return change


def pickle_it(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


class TestErrors:
    @pytest.fixture(scope="class")
    def checkpoint(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("trained") / "corda"
        saved(folder, target_modules=["q_proj"])
        return folder

    @pytest.fixture
    def src(self, checkpoint, tmp_path):
        return shutil.copytree(checkpoint, tmp_path / "src")

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (shutil.rmtree, FileNotFoundError, "No adapter_config.json in .*save_pretrained wrote"),
            (change_config(peft_type="LORA"), ValueError, "of type 'LORA', expected CORDA"),
            (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "not a readable"),
            (pickle_it, FileNotFoundError, "only a adapter_model.bin.*safe_serialization=True"),
            (
                lambda f: (f / "adapter_model.safetensors").write_text("{"),
                ValueError,
                "is not a readable safetensors file",
            ),
            (
                drop_start,
                ValueError,
                r"lacks 2 tensors, such as base_model.*q_proj.lora_start_A.*again",
            ),
            (drop_all, ValueError, "lacks any lora_A tensor"),
            (break_values, ValueError, "q_proj has NaN or infinite values"),
            (reshape_one, ValueError, r"q_proj do not match: A \(8, 48\).*B0 \(48, 5\)"),
            (
                change_config(r=4),
                ValueError,
                "adapter of rank 8, but the checkpoint's config says 4",
            ),
        ],
    )
    def test_checkpoint(self, src, tmp_path, change, error, message):
        change(src)
        with pytest.raises(error, match=message):
            export_lora(src, tmp_path / "lora")
        assert [path.name for path in tmp_path.iterdir()] in (["src"], [])

    def test_a_folder_with_named_adapters(self, src, tmp_path):
        with pytest.raises(FileNotFoundError, match="adapters in its folders src. Give one"):
            export_lora(tmp_path, tmp_path.parent / "lora")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
            ({"rank": True}, "rank must be a whole number of at least 1, got True"),
            ({"rank": 2.0}, r"rank must be a whole number of at least 1, got 2\.0"),
            ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, .*got 'int8'"),
            ({"dtype": torch.int8}, r"dtype must be one of .*got torch\.int8"),
            ({"dst": "src"}, "dst is src"),
            ({"dst": "src/lora"}, "lies in src, .* as a second adapter"),
            ({"dst": "file"}, "is a file; give the path of the folder"),
            ({"dst": "full"}, r"holds other files \(notes.txt\)"),
            ({"dst": "other"}, "not an earlier export"),
        ],
    )
    def test_arguments(self, src, tmp_path, options, message):
        (tmp_path / "file").write_text("")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "notes.txt").write_text("")
        shutil.copytree(src, tmp_path / "other")
        before = sorted(tmp_path.rglob("*"))
        options = {"dst": "lora", **options}
        with pytest.raises(ValueError, match=message):
            export_lora(src, tmp_path / options.pop("dst"), **options)
        assert sorted(tmp_path.rglob("*")) == before

    def test_values_too_large_for_the_dtype(self, src, tmp_path):
        path = src / "adapter_model.safetensors"
        tensors = {k: 1e6 * v if "lora_" in k else v for k, v in load_file(path).items()}
        save_file(tensors, path)
        with pytest.raises(ValueError, match="too large for the dtype to write"):
            export_lora(src, tmp_path / "lora", dtype="float16")
        export_lora(src, tmp_path / "lora", dtype="bfloat16")

    @pytest.mark.parametrize("is_there", [False, True])
    def test_a_failed_write_leaves_what_was_there(self, src, tmp_path, is_there, monkeypatch):
        if is_there:
            export_lora(src, tmp_path / "lora", rank=1)
        before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

        def failing(*args, **kwargs):
            raise OSError("no space left")

        monkeypatch.setattr("kprune_ext.files.writing.save_file", failing)
        with pytest.raises(OSError, match="no space left"):
            export_lora(src, tmp_path / "lora")
        after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        assert after == before
