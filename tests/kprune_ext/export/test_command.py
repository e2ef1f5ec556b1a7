"""The subcommand `kprune export`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kprune_ext.cli import main
from tests.helpers.gguf import byte_level, fields
from tests.helpers.kprune_decoders import CUTS, cut, tiny_decoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = byte_level()
    model = cut(tiny_decoder("llama", vocab_size=len(tokenizer)), CUTS["some"])
    model.save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def export(*options: object) -> None:
    main(["export", *map(str, options)])


def test_gguf(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    given = ["--model", folder, "--output", path, "--format", "gguf", "--dtype", "float16"]
    export(*given)
    assert f"Wrote {path}. llama.cpp" in capsys.readouterr().out
    assert fields(path)["general.architecture"] == "deci"
    assert fields(path)["general.file_type"] == 1
    with pytest.raises(SystemExit, match="kprune export: error: .*exists.*--overwrite"):
        export(*given)
    export(*given, "--overwrite", "--pad", "--tokenizer", folder, "--pre_tokenizer", "smollm")
    assert fields(path)["tokenizer.ggml.pre"] == "smollm"
    assert fields(path)["general.architecture"] == "deci"  # nothing had to be filled up


def test_deci(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deci"
    given = ["--model", folder, "--output", out, "--format", "deci"]
    with pytest.raises(SystemExit, match="kprune export: error: .*layers 0, 1 have fewer.*--pad"):
        export(*given)
    with pytest.raises(SystemExit, match="options of the format gguf alone"):
        export(*given, "--overwrite")
    assert not out.exists()
    export(*given, "--pad")
    assert "--trust-remote-code" in capsys.readouterr().out
    assert (out / "configuration_decilm.py").is_file() and (out / "tokenizer.json").is_file()


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        export("--model", folder, "--output", tmp_path / "x", "--format", "onnx")
    assert end.value.code == 2 and "gguf" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="kprune export: error: .*nowhere"):
        export("--model", tmp_path / "nowhere", "--output", tmp_path / "x", "--format", "gguf")
    assert not (tmp_path / "x").exists()
