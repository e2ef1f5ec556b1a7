"""`kprune_to`: bisection over budgets by a score."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from kprune_ext import KPruneConfig, kprune, kprune_to
from tests.helpers.kprune import padded, sequences, tiny_bert

DATA = padded(sequences())
NAME = "bert.embeddings.word_embeddings.weight"
COSTS = {reduction: 1 - reduction for reduction in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)}


def left(model) -> float:
    """A score that falls with every unit: the fraction of FLOPs that is left."""
    report = getattr(model, "kprune_report", None)
    return 1.0 if report is None else report.cost / report.cost_before


def search(evaluate=left, model=None, data=DATA, **options):
    options = {"reductions": [*COSTS], "progress": False} | options
    return kprune_to(model or tiny_bert(), data, evaluate, **options)


@functools.cache
def pruned(reduction: float):
    return kprune(tiny_bert(), DATA, reduction=reduction, progress=False)


@pytest.mark.parametrize("keep", [0.99, 0.75, 0.55, 0.42, 0.15])
def test_the_result_is_that_of_a_full_sweep(keep) -> None:
    found = search(keep=keep)
    scores = {reduction: left(pruned(reduction)) for reduction in COSTS}
    good = [reduction for reduction, score in scores.items() if score >= keep]
    assert found.reduction == max(good, default=0.0)
    assert len(found.trials) <= 1 + 3  # of seven
    if good:
        for name, value in pruned(found.reduction).state_dict().items():
            assert torch.equal(found.model.state_dict()[name], value)
    else:
        assert found.model is None
    assert found.trials[0].reduction == 0 and found.trials[0].cost == 1.0
    assert all(
        t.score == pytest.approx(t.cost) == pytest.approx(scores[t.reduction])
        for t in found.trials[1:]
    )


class Scripted:
    """A score by what was removed, as a validation set of a few hundred examples gives it."""

    def __init__(self, scores: dict[float, float], sign: int = 1) -> None:
        self.scores, self.sign = scores, sign

    def __call__(self, model) -> float:
        if not hasattr(model, "kprune_report"):
            return self.sign * self.scores[0.0]
        removed = 1 - left(model)
        return self.sign * self.scores[min(COSTS, key=lambda reduction: abs(reduction - removed))]


UP_AND_DOWN = dict(
    zip([0.0, *COSTS], [88.5, 88.5, 88.1, 87.2, 87.3, 88.1, 86.6, 50.9], strict=True)
)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_near_miss_does_not_hide_a_smaller_model_that_is_good(sign, tmp_path) -> None:
    options = {"tolerance": 1.0, "greater_is_better": sign > 0, "state_file": tmp_path / "s.json"}
    found = search(Scripted(UP_AND_DOWN, sign), **options)
    assert found.reduction == 0.6 and [t.reduction for t in found.trials] == [0, 0.5, 0.6, 0.7]
    again = search(Scripted(UP_AND_DOWN, sign), **options)
    assert again.trials == found.trials
    assert torch.equal(again.model.state_dict()[NAME], found.model.state_dict()[NAME])


def test_a_clear_miss_is_believed() -> None:
    scores = UP_AND_DOWN | {0.5: 86.0}
    found = search(Scripted(scores), tolerance=1.0)
    assert found.reduction == 0.3 and [t.reduction for t in found.trials] == [0, 0.3, 0.4, 0.5]


def test_losses_and_tolerances() -> None:
    one = search(lambda model: 2 - left(model), greater_is_better=False, tolerance=0.45)
    other = search(keep=0.55)
    assert (one.reduction, one.limit) == (other.reduction, 1.45)
    ratio = search(lambda model: 2 - left(model), greater_is_better=False, keep=1 / 1.45)
    assert ratio.reduction == one.reduction


def test_an_iterator_and_other_options_serve_every_try() -> None:
    config = KPruneConfig(schedule="once", reduction=0.9)
    found = search(data=iter(DATA), config=config, keep=0.55)
    again = search(data=DATA, config=config, keep=0.55)
    assert found.reduction == again.reduction
    assert [t.score for t in found.trials] == [t.score for t in again.trials]


class Counted:
    """A score that counts its calls, and is interrupted at one of them."""

    def __init__(self, stop: int = 0) -> None:
        self.calls, self.stop = 0, stop

    def __call__(self, model) -> float:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return left(model)


def test_an_interrupted_search_goes_on(tmp_path) -> None:
    file, score = tmp_path / "search.json", Counted(stop=3)
    with pytest.raises(KeyboardInterrupt):
        search(score, keep=0.45, state_file=file)
    assert len(json.loads(file.read_text())["trials"]) == 2
    whole, score = search(keep=0.45), Counted()
    found = search(score, keep=0.45, state_file=file)
    assert score.calls == len(whole.trials) - 2
    assert (found.reduction, found.limit) == (whole.reduction, whole.limit)
    # Nothing is left to be scored, and the chosen model is pruned again.
    score = Counted()
    again = search(score, keep=0.45, state_file=file)
    assert not score.calls and again.reduction == found.reduction
    for name, value in found.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_the_file_of_another_search_is_refused(tmp_path) -> None:
    file = tmp_path / "search.json"
    options = {"state_file": file, "reductions": [0.5], "about": {"validation data": "first half"}}
    search(**options)
    other = [batch | {"input_ids": batch["input_ids"].flip(1)} for batch in DATA]
    for change, named in (
        ({"model": tiny_bert(seed=1)}, "weights"),
        ({"config": KPruneConfig(mu=7.0)}, "options"),
        ({"data": other}, "calibration data"),
        ({"data": DATA[:-1]}, "calibration data"),
        ({"evaluate": Counted()}, "evaluate"),
        ({"about": {"validation data": "second half"}}, "validation data"),
    ):
        with pytest.raises(ValueError, match=f"a search with other {named}. Pass another"):
            search(**options | change)
    assert search(**options | {"data": tuple(dict(batch) for batch in DATA)}).trials
    file.write_text("{}")
    with pytest.raises(ValueError, match="is not a file of a search"):
        search(**options)


def test_a_fraction_that_cannot_be_removed_is_too_much(tmp_path) -> None:
    """A plain BertConfig cannot name fewer heads, so equal layers keep all of attention."""
    config = KPruneConfig(layout="uniform")
    options = {"config": config, "state_file": tmp_path / "search.json", "keep": 0.5}
    found = search(reductions=[0.2, 0.8, 0.9], **options)
    assert found.reduction == 0.2
    none = next(trial for trial in found.trials if trial.reduction == 0.8)
    assert none.score is None and none.cost is None
    assert none.note.startswith("reduction=0.8 cannot be reached with layout='uniform': every")
    assert f"80%: {none.note}" in str(found)
    assert search(reductions=[0.2, 0.8, 0.9], **options).trials == found.trials


def test_a_search_as_text_and_values() -> None:
    found = search(keep=0.55)
    assert "score wanted: at least 0.55" in str(found) and str(found).count("<- chosen") == 1
    assert json.loads(json.dumps(found.to_dict()))["trials"][0]["reduction"] == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"evaluate": 0.5}, TypeError, "not a function"),
        ({"evaluate": lambda model: {"accuracy": 1.0}}, TypeError, "returned a dict, not a number"),
        ({"evaluate": lambda model: float("nan")}, ValueError, "cannot be compared"),
        ({"evaluate": lambda model: -1.0}, ValueError, "Pass tolerance="),
        ({"keep": 1.2}, ValueError, "keep=1.2 is not a fraction"),
        ({"keep": 0.5, "tolerance": 0.1}, ValueError, "Pass one of them"),
        ({"tolerance": -1}, ValueError, "tolerance=-1"),
        ({"reductions": []}, ValueError, "pass the fractions"),
        ({"reductions": [0.5, 1.5]}, ValueError, "pass the fractions"),
        ({"config": 0.5}, TypeError, "not a KPruneConfig"),
        ({"state_file": f"{__file__}/a.json"}, OSError, "test_budget_search"),
        ({"covariances": "sums.safetensors"}, ValueError, "a file of one. Leave it out"),
    ],
)
def test_errors_come_before_the_work(options, error, message, monkeypatch) -> None:
    monkeypatch.setattr("kprune_ext.budget_search.kprune", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(error, match=message):
        search(**options)
