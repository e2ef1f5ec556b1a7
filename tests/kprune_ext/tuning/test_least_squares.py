"""Properties of weight tuning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kprune_ext.tuning.least_squares import RIDGES, NormalEquations, choose_ridge, tune_projection

sizes = st.integers(min_value=1, max_value=8)
seeds = st.integers(min_value=0, max_value=10_000)


def normal_equations(*batches: tuple[torch.Tensor, torch.Tensor]) -> NormalEquations:
    equations = NormalEquations.zeros(batches[0][0].shape[1], batches[0][1].shape[1])
    for features, targets in batches:
        equations.update(features, targets)
    return equations


def problem(tokens: int, units: int, outputs: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(tokens, units) + 0.5, draw(tokens, outputs), draw(outputs, units)


@settings(deadline=None)
@given(st.integers(1, 40), sizes, sizes, seeds, st.integers(1, 39))
def test_streaming_in_parts_is_the_same_as_at_once(tokens, units, outputs, seed, cut) -> None:
    features, targets, weight = problem(tokens, units, outputs, seed)
    whole = tune_projection(normal_equations((features, targets)), weight, 1.0)
    parts = normal_equations((features[:cut], targets[:cut]), (features[cut:], targets[cut:]))
    again = tune_projection(parts, weight, 1.0)
    torch.testing.assert_close(again.weight, whole.weight, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(again.bias, whole.bias, rtol=1e-8, atol=1e-9)


@settings(deadline=None)
@given(st.integers(2, 60), sizes, sizes, seeds)
def test_the_gradient_vanishes_at_the_solution(tokens, units, outputs, seed) -> None:
    features, targets, weight = problem(tokens, units, outputs, seed)
    fit = tune_projection(normal_equations((features, targets)), weight, 0.3)
    residual = features @ fit.weight.T + fit.bias - targets
    strength = 0.3 * units / tokens * features.square().sum() / units
    slope = residual.T @ features + strength * (fit.weight - weight)
    scale = (targets.T @ features).abs().max() + strength * weight.abs().max()
    assert slope.abs().max() <= 1e-8 * scale
    assert residual.sum(0).abs().max() <= 1e-8 * (targets.abs().sum() + 1)


@settings(deadline=None)
@given(sizes, sizes, seeds)
def test_an_exact_fit_by_the_original_weights_is_kept(units, outputs, seed) -> None:
    features, _, weight = problem(20, units, outputs, seed)
    bias = weight.sum(1)
    fit = tune_projection(normal_equations((features, features @ weight.T + bias)), weight, 5.0)
    torch.testing.assert_close(fit.weight, weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fit.bias, bias, rtol=1e-7, atol=1e-7)
    assert fit.error < 1e-5


@settings(deadline=None)
@given(sizes, sizes, seeds)
def test_copies_of_a_unit_and_dead_units_do_not_blow_up(units, outputs, seed) -> None:
    features, targets, weight = problem(30, units, outputs, seed)
    features = torch.cat([features, features, torch.zeros(30, 2)], 1)
    weight = torch.cat([weight, weight, torch.ones(outputs, 2)], 1)
    fit = tune_projection(normal_equations((features, targets)), weight, 1e-3)
    assert fit.weight.isfinite().all()
    bound = 10 * (weight.norm() + torch.linalg.pinv(features).norm() * targets.norm())
    assert fit.weight.norm() <= bound
    torch.testing.assert_close(fit.weight[:, -2:], weight[:, -2:])  # dead: left as they were


@pytest.mark.parametrize("tokens", [40, 300])
@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_no_ridge_and_fewer_tokens_than_units_do_not_blow_up(tokens, mean) -> None:
    # Products in float32 round by more than float64 sums do.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(tokens, 384, generator=generator).relu() + mean
    targets = torch.randn(tokens, 16, generator=generator)
    weight = torch.randn(16, 384, generator=generator) / 20
    fit = tune_projection(normal_equations((features, targets)), weight, 0.0)
    fitted = features.double() @ fit.weight.T + fit.bias
    # More unknowns than equations: a close fit, with weights no larger than it takes.
    assert (fitted - targets).norm() < 0.02 * targets.norm()
    centred = features.double() - features.double().mean(0)
    least = torch.linalg.pinv(centred) @ (targets - targets.mean(0)).double()
    assert fit.weight.norm() < 2 * (weight.norm() + least.norm())


def test_a_ridge_that_rounding_beats_is_raised() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 60, generator=generator)
    targets = torch.randn(30, 2, generator=generator)
    equations = normal_equations((features, targets))
    # As of devices that multiply in TensorFloat-32.
    noise = 0.5e-3 * equations.gram.diagonal().mean() * torch.randn(60, 60, generator=generator)
    equations.gram.add_(noise + noise.T)
    assert float(torch.linalg.eigvalsh(equations.gram)[0]) < -0.1
    fit = tune_projection(equations, torch.zeros(2, 60), 0.0)
    assert fit.weight.norm() < 10 * torch.linalg.pinv(features).norm() * targets.norm()


def test_sums_that_are_not_finite_are_an_error_that_says_so() -> None:
    features, targets, weight = problem(30, 6, 3, 0)
    features[3, 2] = float("inf")
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        tune_projection(normal_equations((features, targets)), weight, 1.0)


@settings(deadline=None)
@given(sizes, sizes, seeds)
def test_a_stronger_ridge_stays_closer_to_the_original_weights(units, outputs, seed) -> None:
    features, targets, weight = problem(25, units, outputs, seed)
    equations = normal_equations((features, targets))
    distances = [
        float((tune_projection(equations, weight, ridge).weight - weight).norm())
        for ridge in (0.01, 1.0, 100.0, 1e8)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-4 * (1 + distances[0])


def test_all_units_gone_leaves_the_mean_as_bias() -> None:
    targets = torch.randn(30, 4).double()
    equations = normal_equations((torch.zeros(30, 0).double(), targets))
    fit = tune_projection(equations, torch.zeros(4, 0), 1.0)
    assert fit.weight.shape == (4, 0)
    torch.testing.assert_close(fit.bias, targets.mean(0))
    assert fit.error == pytest.approx(1.0)


def test_float32_batches_are_summed_in_float64() -> None:
    features, targets, weight = problem(4000, 6, 3, 0)
    exact = tune_projection(normal_equations((features, targets)), weight, 1.0)
    rounded = NormalEquations.zeros(6, 3)
    for start in range(0, 4000, 50):
        rounded.update(features[start : start + 50].float(), targets[start : start + 50].float())
    assert rounded.gram.dtype == torch.float64
    fit = tune_projection(rounded, weight, 1.0)
    torch.testing.assert_close(fit.weight, exact.weight, rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(st.integers(1, 40), sizes, sizes, seeds)
def test_squared_error_is_that_of_the_tokens(tokens, units, outputs, seed) -> None:
    features, targets, weight = problem(tokens, units, outputs, seed)
    bias = weight.sum(1)
    wanted = float((features @ weight.T + bias - targets).square().sum())
    found = normal_equations((features, targets)).squared_error(weight, bias)
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(st.integers(1, 40), sizes, sizes, seeds, st.integers(1, 39))
def test_sums_add_up(tokens, units, outputs, seed, cut) -> None:
    features, targets, _ = problem(tokens, units, outputs, seed)
    whole = normal_equations((features, targets))
    one, other = (
        normal_equations((features[part], targets[part])) for part in (slice(cut), slice(cut, None))
    )
    both = one.plus(other)
    for name, value in vars(whole).items():
        torch.testing.assert_close(torch.as_tensor(getattr(both, name)), torch.as_tensor(value))


def halves_of(noise: float, tokens: int) -> tuple[torch.Tensor, tuple[NormalEquations, ...]]:
    """Targets that the original weights give, but for small changes and noise."""
    features, _, weight = problem(2 * tokens, 40, 3, seed=1)
    generator = torch.Generator().manual_seed(2)
    changed = weight + 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    targets = features @ changed.T
    targets += noise * torch.randn(targets.shape, generator=generator, dtype=torch.float64)
    parts = zip(features.chunk(2), targets.chunk(2), strict=True)
    return weight, tuple(normal_equations(part) for part in parts)


def test_the_ridge_is_weak_for_clean_targets_and_strong_for_noise() -> None:
    weight, clean = halves_of(noise=0.0, tokens=400)
    assert choose_ridge(clean, weight) == min(RIDGES)
    weight, noisy = halves_of(noise=30.0, tokens=60)
    assert choose_ridge(noisy, weight) == max(RIDGES)


def test_the_chosen_ridge_is_nearly_the_best_on_tokens_never_seen() -> None:
    weight, halves = halves_of(noise=4.0, tokens=60)
    features, *_ = problem(4000, 40, 3, seed=5)
    generator = torch.Generator().manual_seed(2)
    changed = weight + 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    unseen = normal_equations((features, features @ changed.T))
    chosen = choose_ridge(halves, weight)
    both = halves[0].plus(halves[1])
    fits = {ridge: tune_projection(both, weight, ridge) for ridge in (*RIDGES, 1e-6)}
    errors = {ridge: unseen.squared_error(fit.weight, fit.bias) for ridge, fit in fits.items()}
    assert errors[chosen] <= 1.2 * min(errors[ridge] for ridge in RIDGES)
    assert errors[chosen] < errors[1e-6]


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-30])
def test_targets_that_every_ridge_fits_perfectly(scale: float) -> None:
    features, _, weight = problem(60, 5, 3, seed=1)
    targets = scale * (features @ weight.T)
    parts = zip(features.chunk(2), targets.chunk(2), strict=True)
    halves = tuple(normal_equations(part) for part in parts)
    assert choose_ridge(halves, scale * weight) == max(RIDGES)


def test_without_two_halves_the_ridge_is_a_usual_one() -> None:
    weight, (half, _) = halves_of(noise=1.0, tokens=50)
    empty = NormalEquations.zeros(40, 3)
    assert choose_ridge((half, empty), weight) == choose_ridge((empty, half), weight) == 3.0
