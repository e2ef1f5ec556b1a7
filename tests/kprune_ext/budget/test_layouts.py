"""Sizes of layers: free, the same everywhere, rounded; and the costs of decoders' units."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kprune_ext.architectures.table import find_architecture
from kprune_ext.budget.costs import budget_for, cost_tables, least_units, unit_parameters
from kprune_ext.budget.key_value_cache import cache_bytes_of
from kprune_ext.budget.search import search_masks
from kprune_ext.budget.selection import selected
from kprune_ext.budget.uniform import allowed_sizes, rounded, uniform_sizes
from kprune_ext.units.plain import PlainSizes, plain_sizes
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


@pytest.mark.parametrize("heads_allowed", [(1, 2, 3), (1, 3), (3,)])
@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_uniform_sizes_keep_the_most_knowledge_that_fits(
    seed: int, round_to: int, heads_allowed: tuple[int, ...]
) -> None:
    scores, costs = problem(seed)
    allowed = PlainSizes(heads_allowed, tuple(range(round_to, 13, round_to)))
    for budget in (5, 20, 33, 66):
        best = {
            (heads, neurons): sum(
                float(s.sort(descending=True).values[:n].sum())
                for s, n in zip(scores, (heads, neurons) * 2, strict=True)
            )
            for heads, neurons in itertools.product(allowed.heads, allowed.neurons)
            if 2 * (7 * heads + neurons) <= budget
        }
        if not best:
            with pytest.raises(ValueError, match="Lower reduction or round_to"):
                uniform_sizes(scores, KINDS, costs, budget, allowed)
            continue
        assert uniform_sizes(scores, KINDS, costs, budget, allowed) == max(best, key=best.get)


def test_uniform_sizes_respect_a_lower_bound() -> None:
    scores, costs = problem(0)
    scores[0] *= 1e-6
    scores[2] *= 1e-6
    allowed = PlainSizes((1, 2, 3), tuple(range(1, 13)))
    assert uniform_sizes(scores, KINDS, costs, 66.0 * 0.7, allowed)[0] == 1
    assert uniform_sizes(scores, KINDS, costs, 66.0 * 0.7, allowed, least=[2, 2, 2, 2])[0] == 2


def test_families_name_heads_and_neurons_as_far_as_their_configs_can() -> None:
    every = tuple(range(1, 21))
    assert plain_sizes(tiny_decoder("llama").config) == PlainSizes((1, 2, 3), every)
    # Three heads do not divide 20 dimensions, as Llama's config wants them to, but not Mistral's.
    sizes = {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 6}
    assert plain_sizes(tiny_decoder("mistral", **sizes).config).heads == (1, 2, 3, 4, 5)
    wide = {"hidden_size": 20, **sizes}
    assert plain_sizes(tiny_decoder("llama", **wide).config).heads == (1, 2, 4, 5)
    for family in ("gpt2", "opt"):
        assert plain_sizes(tiny_decoder(family).config) == PlainSizes((3,), every)
    assert plain_sizes(tiny_bert().config, 16) == PlainSizes((4,), (16, 32, 40))


def test_factors_of_longrope_keep_the_heads_of_phi3() -> None:
    factors = {"short_factor": [1.0, 1.0], "long_factor": [1.0, 1.0]}
    plain = tiny_decoder("phi3").config
    if hasattr(plain, "rope_parameters"):
        settings: dict[str, Any] = {"rope_parameters": factors | {"rope_type": "longrope"}}
    else:  # transformers 4
        settings = {"rope_scaling": factors | {"type": "longrope"}}
    model = tiny_decoder("phi3", original_max_position_embeddings=32, **settings)
    assert plain_sizes(model.config).heads == (3,)
    assert plain_sizes(plain).heads == (1, 2, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_bert(), "keeps all 4 heads, as a plain BertConfig cannot name fewer, and at"),
        (lambda: tiny_decoder("gpt2"), "keeps all 3 heads, as a plain GPT2Config cannot name"),
        (
            lambda: tiny_decoder("qwen3"),
            "keeps at least 1 of 3 key-value groups, and at least 1 of",
        ),
    ],
)
def test_the_budget_that_equal_layers_allow_is_named(model, message: str) -> None:
    made = model()
    targets = sublayers(made, find_architecture(made))
    kinds, costs = [t.kind for t in targets], cost_tables(made, targets, "params", 8, None)
    with pytest.raises(ValueError, match=message) as error:
        allowed_sizes(made, kinds, costs, 0.95, 1)
    most = float(re.search(r"largest reduction for this model is ([\d.]+)\.", str(error.value))[1])
    assert allowed_sizes(made, kinds, costs, most, 1).neurons[0] == 1
    with pytest.raises(ValueError, match="cannot be reached"):
        allowed_sizes(made, kinds, costs, most + 2e-6, 1)


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


def test_one_group_stays_where_a_part_of_it_would() -> None:
    costs = [torch.arange(2) * 10.0, torch.arange(41) * 1.0] * 2
    assert least_units(costs, 50.0, 0.5) == [0, 10] * 2
    assert least_units(costs, 50.0, 0.5, one=True) == [1, 10] * 2
    assert least_units(costs, 50.0, [0.0, 0.5] * 2, one=True) == [0, 10] * 2
    assert least_units(costs, 20.0, 0.5, one=True) == [0, 4] * 2  # 28 is more than there is
