"""`peft-corda`: what is checked before the work, and what an interruption says."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from peft_corda import cli
from peft_corda.cli import calibrate as command
from tests.helpers.corda import make_model
from tests.helpers.text import SENTENCES, make_tokenizer


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    model = tmp_path / "source" / "llama"
    make_tokenizer().save_pretrained(model)
    make_model("llama").save_pretrained(model)
    data = tmp_path / "source" / "data.txt"
    data.write_text("\n".join(SENTENCES))
    return [
        "calibrate", f"--model={model}", f"--data={data}", f"--output={tmp_path / 'factors'}",
        "--num_samples=8", "--max_length=8", "--r=4", "--device=cpu",
    ]  # fmt: skip


def test_a_figure_without_matplotlib(tmp_path, monkeypatch) -> None:
    """An entry of None in sys.modules is how Python marks what cannot be imported."""
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="report: error: Plots need matplotlib"):
        cli.main(["report", str(tmp_path / "not read yet"), "--plot=spectra.png"])


def test_a_figure_of_an_unknown_kind(tmp_path) -> None:
    with pytest.raises(SystemExit, match="Figures cannot be written as 'xyz'"):
        cli.main(["report", str(tmp_path / "not read yet"), f"--plot={tmp_path / 'a.xyz'}"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "Nothing was written. With --checkpoint_dir FOLDER, a calibration can be interrupted"),
        (
            ["--checkpoint-dir=parts"],
            "The same command goes on from what is in --checkpoint_dir parts.",
        ),
    ],
)
def test_ctrl_c_is_one_line(arguments, more, said, monkeypatch, capsys) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "calibrate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, *more])
    assert stopped.value.code == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"peft-corda calibrate: interrupted. {said}")
