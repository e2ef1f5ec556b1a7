"""Algebra that holds for any weight and inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_corda.decomposition.covariance import CovarianceAccumulator, damped
from peft_corda.decomposition.directions import decompose
from peft_corda.decomposition.starting_factors import starting_factors


@st.composite
def problems(draw):
    out_features, in_features = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    tokens = draw(st.integers(1, 40))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(out_features, in_features, generator=generator)
    inputs = scale * torch.randn(tokens, in_features, generator=generator)
    rank = draw(st.integers(1, min(out_features, in_features)))
    return weight, inputs, rank


def covariance_of(inputs):
    accumulator = CovarianceAccumulator(inputs.shape[1])
    accumulator.update(inputs)
    return damped(accumulator.finish().matrix, 0.01)


@pytest.mark.parametrize("method", ["kpm", "ipm"])
@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_directions_are_orthonormal_and_values_ordered(method, problem):
    weight, inputs, rank = problem
    found, _ = decompose(weight, covariance_of(inputs), rank, method)
    directions, values = found.U, found.S
    torch.testing.assert_close(directions.T @ directions, torch.eye(rank), rtol=0, atol=1e-5)
    steps = values.diff()
    tolerance = 1e-5 * values.max()
    assert (steps >= -tolerance).all() if method == "kpm" else (steps <= tolerance).all()


@pytest.mark.parametrize("method", ["kpm", "ipm"])
@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_captured_energy_is_optimal(method, problem):
    """`‖U_rᵀ W C‖²` is the sum of the r largest (ipm) or smallest (kpm) squared singular values."""
    weight, inputs, rank = problem
    matrix = covariance_of(inputs)
    directions = decompose(weight, matrix, rank, method)[0].U
    product = weight.double() @ matrix
    spectrum = torch.linalg.svdvals(product) ** 2
    best = spectrum[:rank].sum() if method == "ipm" else spectrum[-rank:].sum()
    found = (directions.double().T @ product).square().sum()
    torch.testing.assert_close(found, best, rtol=1e-3, atol=float(1e-9 * spectrum[0]))


@given(problem=problems(), scaling=st.sampled_from(["paper", "balanced"]))
@settings(max_examples=60, deadline=None)
def test_full_rank_gives_the_weight_back(problem, scaling):
    weight, inputs, _ = problem
    rank = min(weight.shape)
    found, _ = decompose(weight, covariance_of(inputs), rank, "ipm")
    directions, values = found.U, found.S
    a, b = starting_factors(weight, directions, values, scaling, 1.0)
    torch.testing.assert_close(b @ a, weight, rtol=1e-3, atol=1e-4)


@given(problem=problems(), alpha=st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_balanced_factors_have_equal_singular_values(problem, alpha):
    weight, inputs, rank = problem
    found, _ = decompose(weight, covariance_of(inputs), rank, "kpm")
    directions, values = found.U, found.S
    a, b = starting_factors(weight, directions, values, "balanced", alpha)
    torch.testing.assert_close(
        torch.linalg.svdvals(a), torch.linalg.svdvals(b), rtol=1e-3, atol=1e-4
    )


@given(problem=problems(), cuts=st.lists(st.integers(0, 40), max_size=4))
@settings(max_examples=60, deadline=None)
def test_streamed_covariance_equals_the_one_of_all_tokens(problem, cuts):
    _, inputs, _ = problem
    accumulator = CovarianceAccumulator(inputs.shape[1])
    for part in torch.tensor_split(inputs, sorted(cuts)):
        accumulator.update(part)
    found = accumulator.finish()
    expected = inputs.double().T @ inputs.double() / len(inputs)
    assert found.tokens == len(inputs)
    torch.testing.assert_close(
        found.matrix.double(), expected, rtol=1e-4, atol=float(1e-5 * expected.abs().max())
    )
