"""`kprune prune`: what is checked before the work, and what is left after an interruption."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kprune_ext.cli import prune as command
from kprune_ext.cli.main import main
from tests.helpers.kprune import tiny_bert, word_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tiny_bert().save_pretrained(folder)
    word_tokenizer(folder).save_pretrained(folder)
    rows = [{"text": f"word{row % 7} word3", "other": f"word{row % 5}"} for row in range(40)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(source: Path, *more: str) -> list[str]:
    out, data = source.parent / "out", source / "data.jsonl"
    return ["prune", f"--model={source}", f"--data={data}", f"--output={out}", *more]


def no_work(*_: Any, **__: Any) -> None:
    pytest.fail("the work began")


def test_a_figure_without_matplotlib(source, monkeypatch) -> None:
    """An entry of None in sys.modules is how Python marks what cannot be imported."""
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(command, "kprune", no_work)
    with pytest.raises(
        SystemExit, match=r"Plots need matplotlib.*pip install 'peft-corda\[plots\]'"
    ):
        main(arguments(source, "--plot=kept.png"))
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_an_output_that_cannot_be_written(source, monkeypatch) -> None:
    monkeypatch.setattr(command, "kprune", no_work)
    with pytest.raises(SystemExit, match="is a file; give the path of the folder"):
        main([*arguments(source), f"--output={source / 'data.jsonl'}"])
    with pytest.raises(SystemExit, match="is a folder; give the path of the file"):
        main(arguments(source, f"--plot={source}"))


def test_the_model_is_saved_before_its_figure(source, monkeypatch) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("kprune_ext.report.report.save_kept", failing)
    with pytest.raises(
        SystemExit, match=r"The model is complete in .*out, but .*\(no font\). Draw it"
    ):
        main(arguments(source, f"--plot={source.parent / 'kept.png'}", "--reduction=0.3"))
    kept = {path.name for path in (source.parent / "out").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "kprune_report.json"} <= kept


def test_ctrl_c_is_one_line(source, monkeypatch, capsys) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "kprune", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(source))
    assert stopped.value.code == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == (
        "kprune prune: interrupted. No model was written. A run with fewer --max_tokens is shorter."
    )
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_a_self_contained_model(source, capsys) -> None:
    """What its file does in a process without this package is tested with `save_pretrained`."""
    main(arguments(source, "--self-contained", "--reduction=0.3", "--text_field", "text", "other"))
    assert "Load it with trust_remote_code=True" in capsys.readouterr().out
    config = json.loads((source.parent / "out" / "config.json").read_text())
    module, _, kind = config["auto_map"]["AutoModelForSequenceClassification"].partition(".")
    written = (source.parent / "out" / f"{module}.py").read_text()
    assert f"class {kind}(" in written and "import kprune_ext\n" not in written
