"""`decompose` against a float64 SVD: optimal directions, whatever the weight and its inputs.

Small problems are drawn by hypothesis; those of a size where iterating is faster are a few seeded ones.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kprune_ext.common.precision import exact_products
from peft_corda.decomposition import subspace_iteration as iterative
from peft_corda.decomposition.covariance import damped
from peft_corda.decomposition.directions import METHODS, WEIGHTINGS, decompose, right_factor

both_methods = pytest.mark.parametrize("method", METHODS)
both_weightings = pytest.mark.parametrize("weighting", WEIGHTINGS)


def gaussian(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthonormal(rows, columns, seed):
    return torch.linalg.qr(gaussian(rows, columns, seed=seed)).Q


SPECTRA = {
    "power": lambda n: torch.arange(1, n + 1).double() ** -0.7,
    "exponential": lambda n: torch.logspace(0, -3, n).double(),
    "flat": lambda n: torch.linspace(1, 0.95, n).double(),
    "cliff": lambda n: torch.where(torch.arange(n) < max(n - 10, 1), 1.0, 1e-2).double(),
}


def weight_of(out_features, in_features, spectrum, seed):
    least = min(out_features, in_features)
    left, right = orthonormal(out_features, least, seed), orthonormal(in_features, least, seed + 1)
    return (left * SPECTRA[spectrum](least) @ right.T).float()


def covariance_of(features, tokens, seed, damping=0.01):
    """Of inputs with a power-law spectrum and two outlier features."""
    inputs = gaussian(tokens, features, seed=seed) * torch.arange(1, features + 1).double() ** -0.8
    inputs[:, :2] *= 20
    inputs = inputs @ orthonormal(features, features, seed + 1)
    return damped((inputs.T @ inputs / tokens).float(), damping)


def assert_optimal(weight, factor, rank, method, exact=False, slack=0.0):
    """The energy that the directions capture, or leak, is the optimum's, up to a share `slack`."""
    found, energy = decompose(weight, factor, rank, method, exact)
    product = weight.double() @ factor
    values = torch.linalg.svdvals(product).square()
    directions = found.U.double()
    got = float((directions.T @ product).square().sum())
    total = float(values.sum())
    # Float32 directions cannot leave out more than this of the largest values.
    blur = rank * (4e-7) ** 2 * total + 1e-6 * got
    if method == "ipm":
        assert got >= (1 - slack) * float(values[:rank].sum()) - blur
    else:
        assert got <= (1 + slack) * float(values[len(values) - rank :].sum()) + blur
    images = (directions.T @ product).norm(dim=1)
    torch.testing.assert_close(found.S.double(), images, rtol=1e-3, atol=1e-6 * total**0.5)
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(directions.T @ directions, identity, rtol=0, atol=5e-6)
    norms = (directions.T @ weight.double()).norm(dim=1).float()
    torch.testing.assert_close(
        found.weight_norms, norms, rtol=1e-3, atol=1e-7 * float(weight.norm())
    )
    return found, energy, total


@st.composite
def problems(draw):
    shape = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    seed, tokens = draw(st.integers(0, 2**20)), draw(st.integers(1, 40))
    weight = weight_of(*shape, draw(st.sampled_from(sorted(SPECTRA))), seed)
    for row in draw(st.lists(st.integers(0, shape[0] - 1), max_size=3)):
        weight[row] = 0
    covariance = covariance_of(shape[1], tokens, seed, draw(st.sampled_from([0.0, 0.01, 1.0])))
    return weight, covariance, draw(st.integers(1, min(shape)))


@both_methods
@both_weightings
@given(problem=problems())
@settings(max_examples=50, deadline=None)
def test_small_problems(method, weighting, problem):
    weight, covariance, rank = problem
    factor = right_factor(covariance, weighting)
    _, energy, total = assert_optimal(weight, factor, rank, method)
    assert energy == pytest.approx(total, rel=1e-6)


@both_methods
@given(problem=problems())
@settings(max_examples=30, deadline=None)
def test_smaller_rank_is_the_first_columns(method, problem):
    weight, covariance, rank = problem
    whole, _ = decompose(weight, covariance, min(weight.shape), method)
    part, _ = decompose(weight, covariance, rank, method)
    assert torch.equal(part.U, whole.U[:, :rank])
    assert torch.allclose(part.S, whole.S[:rank], rtol=1e-5)


@given(problem=problems())
@settings(max_examples=30, deadline=None)
def test_square_root_weighting_gives_eigenvectors_of_the_output_covariance(problem):
    weight, covariance, rank = problem
    found, _ = decompose(weight, right_factor(covariance, "sqrt_covariance"), rank, "ipm")
    outputs = weight.double() @ covariance @ weight.double().T
    vectors, values = found.U.double(), found.S.double().square()
    tolerance = 1e-5 * float(outputs.norm())
    torch.testing.assert_close(outputs @ vectors, vectors * values, rtol=0, atol=tolerance)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_factor_of_the_weighting(weighting, damping):
    covariance = covariance_of(20, 6, 0, damping)
    factor = right_factor(covariance, weighting)
    square = factor @ factor.T if weighting == "sqrt_covariance" else factor
    # Undamped, what is left of rounding to float32 may be slightly negative; it counts as zero.
    tolerance = 1e-12 if damping else 1e-6
    torch.testing.assert_close(
        square, covariance, rtol=0, atol=tolerance * float(covariance.norm())
    )


SHAPES = [(400, 400), (400, 900), (900, 400)]


@pytest.mark.parametrize("spectrum", list(SPECTRA))
@pytest.mark.parametrize("shape", SHAPES)
@both_methods
def test_iterating_is_nearly_optimal(shape, spectrum, method):
    rank = 24
    assert iterative.is_faster(min(shape), rank, method)
    weight = weight_of(*shape, spectrum, 3)
    covariance = covariance_of(shape[1], 600, 5)
    # Where all values are nearly equal, it hardly matters which directions are taken, and the number
    # of rounds is limited.
    slack = 1e-4 if method == "ipm" else 1.5e-2 if spectrum == "flat" else 1e-2
    for weighting in WEIGHTINGS:
        factor = right_factor(covariance, weighting)
        _, energy, total = assert_optimal(weight, factor, rank, method, slack=slack)
        assert energy == pytest.approx(total, rel=0.02)


@both_methods
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_at_any_size(shape, method):
    weight, covariance = weight_of(*shape, "power", 3), covariance_of(shape[1], 600, 5)
    found, energy, total = assert_optimal(weight, covariance, 24, method, exact=True)
    assert energy == pytest.approx(total, rel=1e-6)
    part, _ = decompose(weight, covariance, 10, method, exact=True)
    assert torch.equal(part.U, found.U[:, :10])


@both_methods
def test_rank_deficient_products_of_any_size(method):
    """Fewer tokens than dimensions and no damping, and rows of zeros in the weight."""
    weight, covariance = weight_of(400, 500, "power", 3), covariance_of(500, 90, 5, damping=0.0)
    weight[[0, 7, 399]] = 0
    for weighting in WEIGHTINGS:
        factor = right_factor(covariance, weighting)
        found, _, _ = assert_optimal(weight, factor, 24, method, slack=5e-3)
        assert found.S.isfinite().all() and found.U.isfinite().all()


@both_methods
def test_nothing_but_zeros(method):
    found, energy = decompose(torch.zeros(400, 400), torch.eye(400).double(), 8, method)
    assert energy == 0 and not found.S.any()
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@both_methods
def test_scale_of_the_inputs_does_not_matter(method, scale):
    weight, covariance = weight_of(400, 400, "power", 3), covariance_of(400, 600, 5)
    assert_optimal(weight, scale * covariance, 24, method, slack=5e-3)


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e7])
def test_directions_of_badly_conditioned_tall_weights_are_orthonormal(condition):
    """Dividing by a triangle of the weight's Gram matrix would blur those with small values."""
    left, right = orthonormal(96, 40, 0), orthonormal(40, 40, 1)
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 40).double()
    weight = (left * values @ right.T).float()
    assert_optimal(weight, torch.eye(40).double(), 6, "kpm")


@both_methods
@pytest.mark.parametrize("size", [40, 400])
def test_repeated_to_the_bit(method, size):
    weight, covariance = weight_of(size, size, "power", 3), covariance_of(size, 600, 5)
    first, energy = decompose(weight, covariance, 8, method)
    torch.manual_seed(123)
    second, again = decompose(weight.clone(), covariance.clone(), 8, method)
    assert torch.equal(first.U, second.U) and torch.equal(first.S, second.S) and energy == again


def test_one_direction_far_below_the_others_does_not_hide_them():
    """As in an attention projection of a real model."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [torch.logspace(2.5, -2, 300), torch.logspace(-2, -4, 99), torch.tensor([1e-7])]
    ).double()
    left, right = (
        torch.linalg.qr(torch.randn(400, 400, generator=generator, dtype=torch.float64)).Q
        for _ in range(2)
    )
    triangle = torch.linalg.qr(left * values @ right.T, mode="r").R
    found, sizes = iterative.smallest_right(triangle, 96)
    leaked = (triangle @ found).square().sum()
    assert leaked <= 1.01 * values[-96:].square().sum()
    torch.testing.assert_close(sizes.square().sum(), leaked, rtol=1e-6, atol=0)
    assert bool((sizes.diff() >= 0).all())


@pytest.mark.parametrize("shape", [(400, 400), (800, 400), (400, 900)])
@pytest.mark.parametrize("rank", [1, 4, 48])
def test_values_near_the_rounding_of_a_product_are_found(shape, rank):
    """With singular values over seven orders of magnitude, float32 products alone blur the least."""
    least = min(shape)
    values = torch.logspace(0, -5, least).double()
    values[-3:] = torch.tensor([3e-6, 1e-6, 3e-7])
    left, right = orthonormal(shape[0], least, 0), orthonormal(shape[1], least, 1)
    weight = (left * values @ right.T).float()
    covariance = covariance_of(shape[1], 2000, 5).double()
    assert_optimal(weight, covariance, rank, "kpm", slack=5e-3)
    found, _ = decompose(weight, covariance, rank, "kpm")
    least_values = torch.linalg.svdvals(weight.double() @ covariance)[-rank:].flip(0)
    torch.testing.assert_close(found.S.double(), least_values, rtol=0.05, atol=0)


@pytest.mark.parametrize("lossless", [True, False])
def test_float32_products_on_a_gpu_are_of_full_precision(lossless):
    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")  # from PyTorch 2.9 on
    name = "fp32_precision" if new else "allow_tf32"
    before = getattr(matmul, name)
    with (
        pytest.raises(RuntimeError, match="in between"),
        exact_products(torch.device("cuda"), lossless),
    ):
        inside = getattr(matmul, name)
        raise RuntimeError("in between")
    assert inside == (("tf32" if lossless else "ieee") if new else lossless)
    assert getattr(matmul, name) == before
