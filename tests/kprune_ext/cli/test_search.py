"""`kprune search` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kprune_ext import load_report
from kprune_ext.cli.main import main
from tests.helpers.kprune import tiny_bert
from tests.helpers.kprune_decoders import tiny_decoder
from tests.kprune_ext.cli.conftest import Given


def test_the_smallest_good_model_is_written(given: Given, tmp_path: Path, capsys) -> None:
    state = tmp_path / "search.json"
    arguments = given("search", tiny_bert(), "accuracy", state_file=state, tolerance=1)
    main([*arguments, "--reductions", "0.3", "0.5"])
    said = capsys.readouterr().out
    assert "score wanted: at least" in said and said.count("<- chosen") == 1
    assert "Wrote" in said and "with 50% removed. Load it as usual after" in said
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists() and model.config.num_labels == 3
    assert load_report(tmp_path / "out").reduction == 0.5
    trials = json.loads(state.read_text())["trials"]
    assert [trial["reduction"] for trial in trials] == [0.0, 0.3, 0.5]
    with pytest.raises(SystemExit, match="is of a search with other data to score on"):
        main(
            [*arguments, f"--eval_data={tmp_path / 'source/data.jsonl'}", f"--output={tmp_path}/a"]
        )
    with pytest.raises(SystemExit, match="is of a search with other way of scoring"):
        main([*arguments, "--eval_field=sentence1", f"--output={tmp_path}/a"])
    with pytest.raises(SystemExit, match="is of a search with other form of the calibration data"):
        main([*arguments, "--text_field=sentence1", f"--output={tmp_path}/a"])


def test_nothing_is_written_if_no_model_is_good_enough(given: Given, tmp_path, capsys) -> None:
    arguments = given("search", tiny_decoder("llama"), "perplexity", task="causal-lm", keep=1)
    with pytest.raises(
        SystemExit, match="No model was written: with 80% removed, .* misses the limit"
    ):
        main([*arguments, "--reductions=0.8", "--max_length=16"])
    assert "score wanted: at most" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_language_model_by_its_perplexity(given: Given, tmp_path) -> None:
    arguments = given(
        "search", tiny_decoder("llama"), "perplexity", task="causal-lm", keep=0.1, max_length=16
    )
    main([*arguments, "--reductions=0.2"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.kprune


def test_ctrl_c_says_how_to_go_on(given: Given, monkeypatch, capsys) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("kprune_ext.budget_search.kprune", interrupted)
    arguments = given("search", tiny_bert(), "accuracy")
    for more, said in (
        ([], "No model was written. With --state_file FILE, a search can go on where it was."),
        (["--state-file=a.json"], "No model was written. The same command goes on from a.json."),
    ):
        monkeypatch.chdir(Path(arguments[1].partition("=")[2]))
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *more])
        assert stopped.value.code == 130
        assert capsys.readouterr().err.strip().endswith(f"kprune search: interrupted. {said}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"keep": 0.9, "tolerance": 0.1}, "Both keep= and tolerance= were passed"),
        ({"reductions": "0.5,1.5"}, "each between 0 and 1"),
        ({"output": "{source}"}, "holds other files"),
        ({"state_file": "{source}/test.jsonl"}, "state_file and eval_data are both"),
        ({"eval_data": "none.jsonl"}, "No data file at 'none.jsonl'"),
        ({"eval_field": "sentence"}, "no field 'sentence'; .* Pass the right one as eval_field"),
        ({"label_field": "labels"}, "no field 'labels' with labels; their fields are text"),
        ({"label_field": "text"}, "holds 'word.*', which is no class of the model: it has 3"),
        ({"eval": "spearman"}, "a score of embedders.*the model is for sequence classification"),
        ({"eval": "accuracy", "task": "masked-lm"}, "a score of classifiers .* masked language"),
        ({"eval": "spearman", "task": "embeddings", "label_field": "text"}, "not a number"),
    ],
)
def test_mistakes_are_told_before_the_work(
    more, message, given: Given, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("kprune_ext.budget_search.kprune", lambda *_, **__: pytest.fail("too late"))
    source = tmp_path / "source"
    changed = {name: str(value).format(source=source) for name, value in more.items()}
    with pytest.raises(SystemExit, match=message):
        main(given("search", tiny_bert(), **{"score": "accuracy"} | changed))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
