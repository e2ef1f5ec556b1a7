"""At the end of pruning, logits are scaled such that predictions come nearer to the original's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kprune_ext import KPruneConfig, KPruneReport, kprune
from kprune_ext.tuning.divergence import divergence
from tests.helpers.kprune import padded, sequences, tiny_bert
from tests.helpers.kprune_models import CASES, batches_for, tiny


def pruned_by(model: Any, batches: Any, **options: Any) -> Any:
    return kprune(model, batches, KPruneConfig(reduction=0.5, **options), progress=False)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_every_family_and_task(family: str, task: str) -> None:
    """Classifiers and answers are scaled; tied token predictions and embeddings are left alone."""
    batches = batches_for(family)
    scaled = pruned_by(tiny(family, task), batches)
    plain = pruned_by(tiny(family, task), batches, scale_logits=False)
    scale = scaled.kprune_report.logit_scale
    assert plain.kprune_report.logit_scale is None
    assert (scale is None) == (task in ("masked", "embeddings"))
    before = dict(plain.named_parameters())
    changed = {n for n, p in scaled.named_parameters() if not torch.equal(p, before[n])}
    if scale is None:
        assert not changed
        return
    assert scale != 1
    weight, bias = sorted(changed, key=len, reverse=True)
    assert weight.removesuffix("weight") == bias.removesuffix("bias")
    for name in changed:
        torch.testing.assert_close(dict(scaled.named_parameters())[name], scale * before[name])
    for batch in batches:
        with torch.no_grad():
            one, other = scaled(**batch), plain(**batch)
        for values, wanted in zip(one.values(), other.values(), strict=True):
            torch.testing.assert_close(values, scale * wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_probabilities_come_nearer(problem: Any) -> None:
    model = tiny_bert(neurons=80, problem_type=problem)
    batches, other = padded(sequences(120)), padded(sequences(200, seed=5))
    missed = []
    for options in ({}, {"scale_logits": False}):
        pruned = pruned_by(model, batches, **options)
        with torch.no_grad():
            apart = [
                divergence(pruned(**batch).logits, model(**batch).logits, problem)
                for batch in other
            ]
        missed.append(float(torch.cat(apart).mean()))
    assert missed[0] < missed[1]


def test_regression_is_left_alone() -> None:
    model = tiny_bert(labels=1)
    assert pruned_by(model, padded(sequences())).kprune_report.logit_scale is None


def test_logits_that_the_last_layer_does_not_scale_are_left_alone() -> None:
    def shifted(model: Any, batch: Any) -> Any:
        return model(**batch).logits + 1

    pruned = kprune(tiny_bert(), padded(sequences()), predict=shifted, progress=False)
    assert pruned.kprune_report.logit_scale is None

    def halved(model: Any, batch: Any) -> Any:
        return model(**batch).logits / 2

    pruned = kprune(tiny_bert(), padded(sequences()), predict=halved, progress=False)
    assert pruned.kprune_report.logit_scale is not None


def test_a_part_of_the_samples_is_enough_and_does_not_hang_on_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, samples = tiny_bert(), sequences(60)
    whole = pruned_by(model, padded(samples)).kprune_report.logit_scale
    # ten samples of three classes
    monkeypatch.setattr("kprune_ext.judging.quality.MOST_LOGITS", 30)
    parts = [
        pruned_by(model, padded(samples, batch=batch)).kprune_report.logit_scale for batch in (8, 5)
    ]
    assert parts[0] == pytest.approx(parts[1], rel=1e-4)
    assert parts[0] != pytest.approx(whole, rel=1e-3)


def test_the_report_tells_and_older_ones_still_load() -> None:
    report = pruned_by(tiny_bert(), padded(sequences())).kprune_report
    assert report.logit_scale is not None
    assert f"logits times {report.logit_scale:.3f}" in str(report)
    assert KPruneReport.from_dict(report.to_dict()) == report
    old = report.to_dict()
    del old["logit_scale"]
    assert KPruneReport.from_dict(old).logit_scale is None
