"""From knowledge to masks: the scale of lambda, lower bounds, and tables of costs."""

from __future__ import annotations

import pytest
import torch

from kprune_ext import KPruneConfig
from kprune_ext.architectures.table import find_architecture
from kprune_ext.budget.costs import least_units
from kprune_ext.budget.search import search_masks
from kprune_ext.knowledge.measure import Knowledge
from kprune_ext.knowledge.scores import unit_scores
from kprune_ext.samples.choice import largest_scored, sample_keys
from kprune_ext.samples.samples import collect_samples
from kprune_ext.units.sublayers import sublayers
from tests.helpers.kprune import padded, sequences, tiny_bert


def known(factor: float = 1.0) -> list[Knowledge]:
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 40, 4, 40)
    draw = [torch.rand(2, size, generator=generator, dtype=torch.float64) for size in sizes]
    return [Knowledge(one, factor * other, 50) for one, other in draw]


def scores_of(knowledge: list[Knowledge], **options) -> list[torch.Tensor]:
    model = tiny_bert()
    targets = sublayers(model, find_architecture(model))
    relative = options.pop("lambda_scale", "relative") == "relative"
    return unit_scores(targets, knowledge, relative=relative, **options)


def test_relative_lambda_does_not_depend_on_the_scale_of_the_knowledge() -> None:
    options = {"lambda_rep": 0.7, "prior_samples": 0}
    plain, scaled = scores_of(known(), **options), scores_of(known(1e6), **options)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other)
    total = sum(float(values.sum()) for values in plain)
    predictive = sum(float(values.predictive.sum()) for values in known())
    assert total == pytest.approx(1.7 * predictive)
    absolute = scores_of(known(1e6), lambda_scale="absolute", **options)
    torch.testing.assert_close(
        absolute[1], known()[1].predictive + 7e5 * known()[1].representational
    )


def test_where_one_kind_of_knowledge_is_empty_the_other_decides() -> None:
    empty = [Knowledge(torch.zeros_like(k.predictive), k.representational, 50) for k in known()]
    for found, wanted in zip(scores_of(empty, prior_samples=1), empty, strict=True):
        torch.testing.assert_close(found, 1.02 * wanted.representational)  # one sample in 50


@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_prior_samples_count_as_samples_of_representational_shape(scale: str) -> None:
    measured = known()
    total = sum(float(values.predictive.sum()) for values in measured)
    spread = total / sum(float(values.representational.sum()) for values in measured)
    options = {"lambda_rep": 0.0, "lambda_scale": scale}
    for found, values in zip(
        scores_of(measured, prior_samples=5, **options), measured, strict=True
    ):
        mean = (50 * values.predictive + 5 * spread * values.representational) / 55
        torch.testing.assert_close(found, 1.1 * mean)  # what scales all units alike decides nothing
    for found, values in zip(
        scores_of(measured, prior_samples=0, **options), measured, strict=True
    ):
        torch.testing.assert_close(found, values.predictive)


def test_prior_samples_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match=r"prior_samples=-1 is negative. Pass 0 to use"):
        KPruneConfig(prior_samples=-1)


def test_mu_weighs_the_mean_over_a_heads_dimensions() -> None:
    plain, weighed = scores_of(known()), scores_of(known(), mu=3.0)
    torch.testing.assert_close(weighed[0], 3 / 6 * plain[0])  # heads of six dimensions
    torch.testing.assert_close(weighed[1], plain[1])


def test_bounds_are_parts_of_pruning_all_alike() -> None:
    costs = [torch.arange(5) * 10.0, torch.arange(41) * 1.0]
    assert least_units(costs, 40.0, 0.5) == [1, 10]
    assert least_units(costs, 40.0, 0.0) == [0, 0]
    fixed = [cost + 5 for cost in costs]
    assert least_units(fixed, 50.0, 0.5) == [1, 10]


def test_bounds_rank_before_scores_and_within_the_budget() -> None:
    scores = [torch.tensor([1.0, 3.0, 2.0]), torch.tensor([9.0, 8.0, 7.0])]
    free = search_masks(scores, [1, 1], 3)
    assert [mask.tolist() for mask in free] == [[False] * 3, [True] * 3]
    bound = search_masks(scores, [1, 1], 3, [1, 0])
    assert [mask.tolist() for mask in bound] == [[False, True, False], [True, True, False]]
    assert sum(int(mask.sum()) for mask in search_masks(scores, [1, 1], 2, [2, 2])) == 2


def test_tables_charge_the_first_unit_first() -> None:
    scores = [torch.tensor([1.0, 5.0]), torch.tensor([2.0])]
    tables = [torch.tensor([1.0, 9.0, 10.0]), torch.tensor([0.0, 3.0])]
    # Ranked 5 / 4.5, 2 / 3, 1 / 4.5; 1 for the empty first group, 8 for its first unit.
    for budget, kept in ((8.9, 0), (9, 1), (11.9, 1), (12, 2), (13, 3)):
        masks = search_masks(scores, tables, budget)
        assert sum(int(mask.sum()) for mask in masks) == kept
        assert bool(masks[0][1]) == (kept > 0)


@pytest.mark.parametrize("table", [[0.0, 2.0, 1.0], [0.0, 1.0], [-1.0, 0.0, 1.0]])
def test_tables_that_make_no_sense(table: list[float]) -> None:
    with pytest.raises(ValueError, match="must hold 3 numbers of at least 0 that do not decrease"):
        search_masks([torch.ones(2)], [torch.tensor(table)], 1)


def test_how_many_samples_are_scored() -> None:
    keys = torch.randperm(1000).tolist()
    assert largest_scored(keys, 0.15, 20) == 149
    assert largest_scored(keys, 0.15, 512) == 511
    assert largest_scored(keys[:30], 0.15, 512) == max(keys[:30])
    assert largest_scored([], 0.15, 512) == -1


def test_keys_of_samples_depend_on_content_and_seed_alone() -> None:
    model, samples = tiny_bert(), sequences(20)
    one, other = (
        dict(zip((tuple(s.inputs["input_ids"][0].tolist()) for s in found), keys, strict=True))
        for found in (
            collect_samples(model, padded(rows), 10_000) for rows in (samples, samples[::-1])
        )
        for keys in [sample_keys(found, 3)]
    )
    assert one == other and len(set(one.values())) == 20
    found = collect_samples(model, padded(samples), 10_000)
    assert not set(sample_keys(found, 4)) & set(one.values())
    assert all(0 <= key < 2**63 for key in one.values())
