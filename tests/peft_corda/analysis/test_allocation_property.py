"""Allocation against a search through all allocations."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_corda import CordaFactors, ModuleFactors, allocate_ranks
from peft_corda.decomposition.directions import Directions

TOLERANCE = 1e-9


def make_factors(method, spectra, shapes):
    modules = {}
    for number, (values, shape) in enumerate(zip(spectra, shapes, strict=True)):
        S = torch.tensor(sorted(values, reverse=method == "ipm")).sqrt()
        found = Directions(torch.zeros(shape[0], len(S)), S, torch.ones(len(S)))
        # More energy than the directions that are held have.
        energy = 1.5 * float(S.double().square().sum())
        sample = torch.zeros(1)
        modules[f"layers.{number}.fc"] = ModuleFactors({method: found}, shape, sample, energy, 2, 9)
    return CordaFactors(modules, 0.01)


@st.composite
def problems(draw, methods=("kpm", "ipm"), equal_costs=False):
    method = draw(st.sampled_from(methods))
    count = draw(st.integers(1, 4))
    # Whole numbers, so that there are ties.
    values = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=4)
    spectra = [draw(values) for _ in range(count)]
    size = st.integers(1, 6)
    shapes = [(draw(size), draw(size)) for _ in range(count)]
    if equal_costs:
        shapes = [(2, 3)] * count
    factors = make_factors(method, spectra, shapes)
    least = sum(sum(shape) for shape in shapes)
    most = sum(len(own) * sum(shape) for own, shape in zip(spectra, shapes, strict=True))
    return method, factors, draw(st.integers(least, most + 5))


def costs_of(factors):
    return {name: sum(module.shape) for name, module in factors.modules.items()}


def spent(factors, ranks):
    return sum(rank * costs_of(factors)[name] for name, rank in ranks.items())


def shares_of(factors, method):
    return {
        name: (module.directions[method].S.double().square() / (module.energy or 1)).tolist()
        for name, module in factors.modules.items()
    }


def total(factors, method, ranks):
    shares = shares_of(factors, method)
    return sum(sum(shares[name][:rank]) for name, rank in ranks.items())


def all_allocations(factors, method, budget):
    names = list(factors.modules)
    spans = [range(1, factors.rank(name, method) + 1) for name in names]
    for ranks in itertools.product(*spans):
        found = dict(zip(names, ranks, strict=True))
        if spent(factors, found) <= budget:
            yield found


@given(problem=problems())
@settings(max_examples=200, deadline=None)
def test_never_over_budget_and_nothing_more_would_fit(problem):
    method, factors, budget = problem
    ranks = allocate_ranks(factors, budget)
    left = budget - spent(factors, ranks)
    assert left >= 0
    for name, rank in ranks.items():
        assert 1 <= rank <= factors.rank(name, method)
        assert rank == factors.rank(name, method) or costs_of(factors)[name] > left
    assert ranks == allocate_ranks(factors, budget)


@given(problem=problems(equal_costs=True))
@settings(max_examples=200, deadline=None)
def test_optimal_where_all_ranks_cost_the_same(problem):
    method, factors, budget = problem
    ranks = allocate_ranks(factors, budget)
    sums = [
        total(factors, method, other)
        for other in all_allocations(factors, method, budget)
        if spent(factors, other) == spent(factors, ranks)
    ]
    best = max(sums) if method == "ipm" else min(sums)
    assert total(factors, method, ranks) == pytest.approx(best, abs=TOLERANCE)


@given(problem=problems(["ipm"]))
@settings(max_examples=200, deadline=None)
def test_ipm_misses_less_than_one_direction_of_the_optimum(problem):
    method, factors, budget = problem
    ranks = allocate_ranks(factors, budget)
    best = max(total(factors, method, other) for other in all_allocations(factors, method, budget))
    shares = shares_of(factors, method)
    next_ones = [shares[name][rank] for name, rank in ranks.items() if rank < len(shares[name])]
    missed = best - total(factors, method, ranks)
    assert missed <= max(next_ones, default=0) + TOLERANCE


@given(problem=problems())
@settings(max_examples=300, deadline=None)
def test_nothing_less_wanted_is_taken_than_what_is_left_and_could_be_afforded(problem):
    method, factors, budget = problem
    ranks = allocate_ranks(factors, budget)
    shares, costs = shares_of(factors, method), costs_of(factors)
    left = budget - spent(factors, ranks)

    def unwanted(name, position):
        share = shares[name][position]
        return share if method == "kpm" else -share / costs[name]

    for name, rank in ranks.items():
        for other, other_rank in ranks.items():
            if rank > 1 and other_rank < len(shares[other]) and costs[other] <= left + costs[name]:
                assert unwanted(name, rank - 1) <= unwanted(other, other_rank) + TOLERANCE


def test_ties_go_to_lower_ranks_first():
    factors = make_factors("kpm", [[1.0] * 4] * 3, [(2, 3)] * 3)
    assert list(allocate_ranks(factors, 8 * 5).values()) == [3, 3, 2]


def test_values_out_of_order_in_their_last_digits():
    factors = make_factors("ipm", [[4.0, 1.0, 1.0]] * 2, [(2, 3)] * 2)
    factors.modules["layers.0.fc"].directions["ipm"].S[2] += 1e-6
    assert list(allocate_ranks(factors, 4 * 5).values()) == [2, 2]


def test_ipm_counts_what_a_direction_costs_and_kpm_does_not():
    spectra, shapes = [[4.0, 3.0], [4.0, 3.0]], [(9, 9), (2, 3)]
    assert list(allocate_ranks(make_factors("ipm", spectra, shapes), 41).values()) == [1, 2]
    assert list(allocate_ranks(make_factors("kpm", spectra, shapes), 41).values()) == [2, 1]
