"""`kprune sweep` as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModel

from kprune_ext import kprune
from kprune_ext.cli import sweep as command
from kprune_ext.cli.main import main
from kprune_ext.evaluation.frontier import Frontier, Point
from tests.helpers.kprune import tiny_bert
from tests.helpers.kprune_models import tiny
from tests.kprune_ext.cli.conftest import Given


def results(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


def test_a_folder_for_each_size_and_what_is_done_is_not_done_again(
    given: Given, tmp_path: Path, monkeypatch, capsys
) -> None:
    runs = []
    monkeypatch.setattr(
        command, "kprune", lambda *a, **k: runs.append(a[2].reduction) or kprune(*a, **k)
    )
    out = tmp_path / "out"
    arguments = given("sweep", tiny("bert", "embeddings"), "spearman", task="embeddings")
    main([*arguments, "--reductions", "0.3", "0.6", "--latency_batch=2"])
    said = capsys.readouterr().out
    assert "| removed | spearman |" in said and "2 sequences of mean length (cpu" in said
    assert {path.name for path in out.iterdir()} == {
        "30", "60", "sweep.json", "sweep.md", "sweep.png",
    }  # fmt: skip
    assert (
        AutoModel.from_pretrained(out / "60").num_parameters()
        == (results(out)["frontier"]["points"][1]["parameters"])
    )
    assert (out / "sweep.md").read_text() in said
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # As if it had been interrupted after a folder was written.
    stored = results(out)
    del stored["frontier"]["points"][1]
    (out / "sweep.json").write_text(json.dumps(stored))
    main([*arguments, "--reductions", "0.6,0.3", "--latency_batch=2"])
    assert runs == [0.3, 0.6]
    points = results(out)["frontier"]["points"]
    assert [point["folder"] for point in points] == ["30", "60"]
    assert points[0] == stored["frontier"]["points"][0]
    with pytest.raises(SystemExit, match="a sweep with other latency_batch. Pass another folder"):
        main(arguments)
    (out / "sweep.json").write_text("[]")
    with pytest.raises(SystemExit, match="is not a file of a sweep"):
        main(arguments)


def test_a_fraction_that_cannot_be_removed_is_a_note(given: Given, tmp_path, capsys) -> None:
    arguments = given("sweep", tiny_bert(), "accuracy", layout="uniform", reductions=0.8)
    main(arguments)
    assert "reduction=0.8 cannot be reached with layout='uniform'" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sweep.json", "sweep.md"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"latency_batch": 0}, "latency_batch=0 is no number of sequences"),
        ({"output": "{source}"}, "holds other files"),
        ({"eval": "perplexity"}, "a score of causal language models"),
    ],
)
def test_mistakes_are_told_before_the_work(
    more, message, given: Given, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(command, "kprune", lambda *_, **__: pytest.fail("too late"))
    changed = {name: str(value).format(source=tmp_path / "source") for name, value in more.items()}
    with pytest.raises(SystemExit, match=message):
        main(given("sweep", tiny_bert(), **{"score": "accuracy"} | changed))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_without_matplotlib_and_after_ctrl_c(given: Given, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(command, "kprune", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(given("sweep", tiny_bert(), "f1"))
    said = capsys.readouterr()
    assert stopped.value.code == 130 and "matplotlib is not installed" in said.out
    assert "the same command goes on from there." in said.err
    assert results(tmp_path / "out")["frontier"]["points"] == []


def test_a_frontier_as_table_and_values() -> None:
    point = Point(0.5, "50", 0.8, 0.49, 1_000, 0.002, 0.005)
    made = Frontier("f1", 0.9, 2_000, "one text").with_point(Point(0.9, note="too much"))
    made = made.with_point(point).with_point(point)
    assert Frontier.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made.markdown().splitlines()[2:5] == [
        "| – | 0.9 | 100.0% | 5.00 | 1.00× | 100.0% | 2,000 |",
        "| 50% | 0.8 | 88.9% | 2.00 | 2.50× | 49.0% | 1,000 |",
        "| 90% | – | – | – | – | – | – |",
    ]
    assert "0.9: too much." in made.markdown()
