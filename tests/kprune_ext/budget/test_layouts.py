"""Sizes of layers: free, the same everywhere, rounded; and the costs of decoders' units."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kprune_ext.architectures.table import find_architecture
from kprune_ext.budget.costs import budget_for, cost_tables, least_units, unit_parameters
from kprune_ext.budget.key_value_cache import cache_bytes_of
from kprune_ext.budget.search import search_masks
from kprune_ext.budget.selection import selected
from kprune_ext.budget.uniform import rounded, uniform_sizes
from kprune_ext.units.sublayers import sublayers
from tests.helpers.kprune import tiny_bert
from tests.helpers.kprune_decoders import DECODERS, cut, equal_texts, tiny_decoder

KINDS = ("attention", "ffn") * 2


def problem(seed: int, heads: int = 3, neurons: int = 12):
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, neurons) * 2
    scores = [torch.rand(size, generator=generator, dtype=torch.float64) ** 3 for size in sizes]
    costs = [
        torch.arange(size + 1.0).double() * unit
        for size, unit in zip(sizes, (7, 1) * 2, strict=True)
    ]
    return scores, costs


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_uniform_sizes_keep_the_most_knowledge_that_fits(seed: int, round_to: int) -> None:
    scores, costs = problem(seed)
    for budget in (5, 20, 33, 66):
        best = {
            (heads, neurons): sum(
                float(s.sort(descending=True).values[:n].sum())
                for s, n in zip(scores, (heads, neurons) * 2, strict=True)
            )
            for heads, neurons in itertools.product(range(4), range(0, 13, round_to))
            if 0 < 2 * (7 * heads + neurons) <= budget
        }
        if not best:
            with pytest.raises(ValueError, match="Lower reduction or round_to"):
                uniform_sizes(scores, KINDS, costs, budget, round_to)
            continue
        assert uniform_sizes(scores, KINDS, costs, budget, round_to) == max(best, key=best.get)


def test_uniform_sizes_respect_a_lower_bound() -> None:
    scores, costs = problem(0)
    scores[0] *= 1e-6
    scores[2] *= 1e-6
    assert uniform_sizes(scores, KINDS, costs, 33.0)[0] == 0
    assert uniform_sizes(scores, KINDS, costs, 33.0, least=[1, 2, 1, 2])[0] == 1


def test_rounding_is_to_the_nearest_that_fits() -> None:
    assert [rounded(n, 20, 8, 20) for n in (0, 3, 5, 11, 13, 19, 20)] == [0, 0, 8, 8, 16, 20, 20]
    assert rounded(15, 20, 8, 15) == 8
    assert rounded(3, 20, 8, -1) == 0


def test_what_one_sub_layer_rounds_off_is_left_to_the_next() -> None:
    scores, costs = problem(3)
    left, kept = 40.0, []
    for step, kind in enumerate(KINDS):
        units = selected(scores[step:], costs[step:], left, [0] * (4 - step), kind=kind, round_to=4)
        assert units == sorted(set(units))
        left -= float(costs[step][len(units)])
        kept.append(len(units))
    assert left >= 0
    assert kept[1] % 4 == 0 and kept[3] % 4 == 0
    best = set(scores[1].argsort(descending=True)[: kept[1]].tolist())
    units = selected(
        scores[1:], costs[1:], 40 - float(costs[0][kept[0]]), [0] * 3, kind="ffn", round_to=4
    )
    assert set(units) == best


def test_given_sizes_are_kept_as_far_as_a_layer_has_them() -> None:
    scores, costs = problem(1)
    units = selected(
        scores, costs, 9.0, [0] * 4, kind="attention", sizes={"attention": 2, "ffn": 5}
    )
    assert units == sorted(scores[0].argsort(descending=True)[:2].tolist())
    units = selected(
        scores, costs, 9.0, [0] * 4, kind="attention", sizes={"attention": 9, "ffn": 5}
    )
    assert units == [0, 1, 2]


def test_free_units_without_rounding_are_those_of_the_search() -> None:
    scores, costs = problem(2)
    mask = search_masks(scores, costs, 30.0, [0, 3, 0, 3])[0]
    assert (
        selected(scores, costs, 30.0, [0, 3, 0, 3], kind="attention")
        == mask.nonzero().flatten().tolist()
    )


def test_lower_bounds_of_each_kind() -> None:
    _, costs = problem(0)
    assert least_units(costs, 66.0, [1.0, 0.5] * 2) == [3, 6] * 2
    assert least_units(costs, 66.0, 0.5) == [1, 6] * 2


@pytest.mark.parametrize("family", DECODERS)
def test_units_of_decoders_cost_what_is_removed_with_them(family: str) -> None:
    model = tiny_decoder(family)
    row = find_architecture(model)
    targets = sublayers(model, row)
    full = [list(range(target.units)) for target in targets]
    for number, target in enumerate(targets[:2]):
        less = [units[1:] if n == number else units for n, units in enumerate(full)]
        smaller = cut(model, list(zip(less[::2], less[1::2], strict=True)))
        assert unit_parameters(target) == model.num_parameters() - smaller.num_parameters()


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "gpt2", "opt"])
def test_flops_are_those_that_pytorch_counts(family: str) -> None:
    model, length = tiny_decoder(family, "embeddings", attn_implementation="eager"), 13
    row = find_architecture(model)
    targets = sublayers(model, row)
    tables = cost_tables(model, targets, "flops", length, None)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**equal_texts(2, length), use_cache=False)
    layers = sum(
        count
        for name, kinds in counter.get_flop_counts().items()
        if name.endswith((".layers", ".h")) or name in ("layers", "h")
        for count in kinds.values()
    )
    total = counter.get_total_flops()
    expected = 2 * sum(int(table[-1]) for table in tables)
    assert expected in (layers, total) or 0 <= total - expected < 0.05 * total  # rotary positions


def test_the_cache_is_counted_in_bytes_per_token() -> None:
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = tiny_decoder("qwen3", dtype=dtype)
        targets = sublayers(model, find_architecture(model))
        outputs = model(**equal_texts(1, 5), use_cache=True)
        stored = sum(
            part.numel() * part.element_size()
            for layer in outputs.past_key_values.layers
            for part in (layer.keys, layer.values)
        )
        assert cache_bytes_of(targets) == stored / 5 == 3 * 3 * 2 * 8 * size
        tables = cost_tables(model, targets, "cache", 5, None)
        assert sum(float(table[-1]) for table in tables) == stored / 5
        assert budget_for(tables, 0.5) == stored / 10


def test_units_without_cost_are_kept_whatever_their_score() -> None:
    scores = [torch.tensor([3.0, 2.0, 1.0]), torch.zeros(4)]
    costs = [torch.arange(4.0).double(), torch.zeros(5, dtype=torch.float64)]
    one, other = search_masks(scores, costs, 1.5)
    assert one.tolist() == [True, False, False] and other.all()


def test_encoders_have_no_cache() -> None:
    model = tiny_bert()
    with pytest.raises(ValueError, match="key-value cache of decoders"):
        cost_tables(model, sublayers(model, find_architecture(model)), "cache", 8, None)
