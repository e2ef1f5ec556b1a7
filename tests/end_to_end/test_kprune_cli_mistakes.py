"""Mistakes in the options and data of `kprune`, and full disks: one line, and nothing is written."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import ViTImageProcessor

from kprune_ext.cli import prune as command
from kprune_ext.cli.main import main
from tests.helpers.kprune import tiny_bert, word_tokenizer
from tests.helpers.kprune_models import tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tiny_bert().save_pretrained(folder)
    word_tokenizer(folder).save_pretrained(folder)
    rows = [
        {
            "text": f"word{row % 7} word3",
            "gaps": None if row % 3 else "word3 word4",
            "label": row % 3,
            "words": ["word1", "word2"],
        }
        for row in range(40)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    data = source / "data.jsonl"
    return ["prune", f"--model={source}", f"--data={data}", f"--output={out}", *more]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_length=0"], "max_length and batch_size must be at least 1"),
        (["--max_length=2"], "max_length=2 has no room for text.* Pass at least 3"),
        (["--text_field=label"], "'label' holds values of type int64, not text"),
        (["--text_field=words"], "'words' holds values of type .*, not text"),
        (['--text_field=["text", "label"]'], "'label' holds values of type int64, not text"),
        (["--text_field=[]"], "takes the name of one field, or of two"),
        (["--device=cudaa"], "device='cudaa' cannot be used here"),
        (["--device=cuda:77"], "device='cuda:77' cannot be used here"),
        (["--device=meta"], "device='meta' cannot be used here"),
        (["--seed=-1"], "seed=-1 is negative"),
        (["--plot=kept.xyz"], "Figures cannot be written as 'xyz'"),
    ],
)
def test_options_are_checked_before_the_work(
    more: list[str], message: str, source, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(command, "kprune", lambda *_, **__: pytest.fail("the work began"))
    with pytest.raises(SystemExit, match=message):
        main(arguments(source, tmp_path / "out", *more))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jsonl", b""),
        ("empty.txt", b""),
        ("broken.jsonl", b"{nonsense\n{"),
        ("binary.txt", b"\xff\xfe\x00\x01"),
        ("broken.csv", b'a,b\n1,2,3,4\n"'),
        ("broken.parquet", b"123"),
    ],
)
def test_data_files_that_cannot_be_read(name, content, source, tmp_path) -> None:
    (source / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"{name}' is empty, or cannot be read") as error:
        main(arguments(source, tmp_path / "out", f"--data={source / name}"))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_rows_without_a_text_are_left_out(source, tmp_path, capsys) -> None:
    main(arguments(source, tmp_path / "out", "--text_field=gaps", "--reduction=0.3"))
    assert "in 14 samples" in capsys.readouterr().out


def test_weights_that_are_not_finite(source, tmp_path) -> None:
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.bias[0] = float("inf")
    model.save_pretrained(source)
    with pytest.raises(SystemExit, match="NaN or infinite values in 1 of .* in classifier.bias"):
        main(arguments(source, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def pictures(tmp_path: Path) -> Any:
    """Saves a data set of images, some of them damaged, and returns the command's arguments."""
    folder = tmp_path / "source"
    tiny("vit").save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)

    def saved(damage: Any) -> list[str]:
        rows = []
        for number in range(12):
            file = io.BytesIO()
            Picture.new("RGB", (20, 20), (9 * number, 90, 250)).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": f"{number}.png"})
        rows[5] = damage(rows[5])
        features = Features({"image": Image(), "name": Value("string")})
        data = Dataset.from_dict({"image": rows, "name": ["a"] * 12}, features)
        data.to_parquet(folder / "data.parquet")
        return [
            "prune", f"--model={folder}", f"--data={folder / 'data.parquet'}",
            f"--output={tmp_path / 'out'}", "--reduction=0.3",
        ]  # fmt: skip

    return saved


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: {**row, "bytes": b"no image"},
        lambda row: {**row, "bytes": row["bytes"][:60]},
        lambda row: {**row, "bytes": b""},
    ],
)
def test_images_that_cannot_be_read(damage, pictures, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"An image in the field 'image' .* cannot be read"):
        main(pictures(damage))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_fields_without_images(pictures, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="'name' holds values of type string, not images"):
        main([*pictures(lambda row: row), "--image_field=name"])
    main(pictures(lambda row: None))
    assert "in 11 samples" in capsys.readouterr().out


FULL = """
import os, resource, signal, sys
import kprune_ext.cli.prune as command
from kprune_ext.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
real = command.save_all
def limited(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        real(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
command.save_all = limited
for limit in (20_000, 1_500, 100):
    try:
        main(sys.argv[2:])
    except SystemExit as error:
        print(error)
    assert os.listdir(sys.argv[1]) == ["source"]
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk(source, tmp_path) -> None:
    """A limit on the size of files stands for it: on weights, then on other files."""
    out = tmp_path / "new" / "folder" / "out"
    given = arguments(source, out, f"--plot={tmp_path / 'kept.png'}", "--device=cpu")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), *given], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 3
    assert all(f"kprune prune: error: Cannot write output='{out}'" in line for line in lines)


def test_a_full_disk_when_the_tokenizer_is_saved(source, tmp_path, monkeypatch) -> None:
    """tokenizers raises a plain Exception."""

    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(SystemExit, match=r"Cannot write output=.*No space left on device"):
        main(arguments(source, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
