"""Sketches of inputs: the same expectation as the covariance, exact where they can be."""

import pytest
import torch

from peft_corda.decomposition.covariance import CrossAccumulator
from peft_corda.decomposition.low_rank import update_product
from peft_corda.decomposition.sketch import (
    decay_step,
    output_energy,
    sketch_of,
    update_energy,
)


def inputs_of(size, tokens, seed=0):
    """Inputs with a spectrum that decays, and one coordinate that is far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.logspace(0, -2, size)
    values[3] *= 1e4
    return torch.randn(tokens, size, generator=generator) * values.sqrt()


def covariance_of(x):
    return (x.T @ x) / len(x)


def exact(covariance, left, right):
    update = left.double() @ right.double()
    return float((update @ covariance.double() @ update.T).trace())


def updates(size, outputs=50, rank=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, rank, generator=generator), torch.randn(
        rank, size, generator=generator
    )


@pytest.mark.parametrize(("size", "tokens"), [(40, 30), (64, 500)])
def test_with_enough_rows_the_sketch_is_the_covariance(size, tokens):
    covariance = covariance_of(inputs_of(size, tokens))
    found = sketch_of(covariance, 64)
    assert found.rows.shape == (size, size) and found.bytes() == 2 * size**2
    assert found.energy == pytest.approx(float(covariance.trace()))
    rows = found.rows.float()
    torch.testing.assert_close(rows.T @ rows, covariance, rtol=0.02, atol=0.01)


@pytest.mark.parametrize(("size", "tokens"), [(100, 400), (400, 120), (400, 2000)])
def test_energy_of_an_update(size, tokens):
    covariance = covariance_of(inputs_of(size, tokens))
    before = covariance.clone()
    found = sketch_of(covariance, 64)
    assert torch.equal(covariance, before) and found.rows.shape == (64, size)
    left, right = updates(size)
    estimate = float(update_energy(found.rows, (left, right)))
    assert estimate == pytest.approx(exact(covariance, left, right), rel=0.02)
    # Away from the leading directions, where only the random rows count.
    top = torch.linalg.eigh(covariance).eigenvectors[:, -32:]
    rest = right - right @ top @ top.T
    estimate = float(update_energy(found.rows, (left, rest)))
    assert estimate == pytest.approx(exact(covariance, left, rest), rel=0.5)
    weight = torch.randn(30, size)
    assert output_energy(found, weight) == pytest.approx(
        exact(covariance, weight, torch.eye(size)), rel=0.05
    )


def test_random_rows_are_right_on_average():
    x = inputs_of(300, 900)
    covariance = covariance_of(x)
    left, right = updates(300)
    top = torch.linalg.eigh(covariance).eigenvectors[:, -8:]
    right = right - right @ top @ top.T
    wanted = exact(covariance, left, right)
    # Signs that are applied to the coordinates of the inputs give other sketches of the same thing.
    found = []
    for seed in range(40):
        flips = torch.randint(0, 2, (300,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        sketch = sketch_of(covariance * flips * flips[:, None], 16)
        found.append(float(update_energy(sketch.rows, (left, right * flips))))
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / 40**0.5
    assert abs(mean - wanted) < 4 * error < 0.4 * wanted


def test_equal_covariances_have_equal_sketches():
    covariance = covariance_of(inputs_of(300, 900))
    assert torch.equal(sketch_of(covariance, 64).rows, sketch_of(covariance.clone(), 64).rows)


def test_inputs_that_are_zero():
    found = sketch_of(torch.zeros(300, 300), 64)
    assert found.energy == 0 and not found.rows.any()
    covariance = covariance_of(inputs_of(300, 900))
    covariance[5], covariance[:, 5] = 0, 0
    assert not sketch_of(covariance, 64).rows[:, 5].any()


@pytest.mark.parametrize("parts", [1, 3])
def test_sketch_beside_a_cross_covariance(parts):
    """Of several processes, whose signs differ, the sums are added."""
    x = inputs_of(200, 1500)
    weight = torch.randn(20, 200)
    sums = [CrossAccumulator(200, 20, probes=64, stream=number) for number in range(parts)]
    for total, own in zip(sums, x.chunk(parts), strict=True):
        for batch in own.split(100):
            total.update_pair(batch, batch @ weight.T)
    whole = sums[0]
    for other in sums[1:]:
        whole.sum += other.sum
        whole.tokens += other.tokens
    found, covariance = whole.finish(), covariance_of(x)
    torch.testing.assert_close(found.matrix, weight @ covariance, rtol=1e-3, atol=1e-3)
    assert found.sketch.energy == pytest.approx(float(covariance.trace()), rel=1e-4)
    left, right = updates(200)
    right[:, 3] = 0
    estimate = float(update_energy(found.sketch.rows, (left, right)))
    assert estimate == pytest.approx(exact(covariance, left, right), rel=0.5)


def test_decay_is_a_step_against_the_gradient_to_the_minimum_along_it():
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sketch, a0, b0 = draw(9, 12), draw(3, 12), draw(7, 3)
    da, db = 0.1 * draw(3, 12), 0.1 * draw(7, 3)
    da.requires_grad_(), db.requires_grad_()

    def energy(a, b):
        return update_energy(sketch, update_product(a, b, a0, b0))

    energy(da, db).backward()
    step = decay_step(sketch, (a0 + da).detach(), (b0 + db).detach(), a0, b0)
    ratios = torch.cat([(step.step_a / da.grad).flatten(), (step.step_b / db.grad).flatten()])
    torch.testing.assert_close(ratios, ratios.mean().expand_as(ratios))
    assert ratios.mean() > 0
    with torch.no_grad():
        along = [
            float(energy(da - t * step.step_a, db - t * step.step_b)) for t in (0, 0.5, 0.9, 1.1, 2)
        ]
    assert along[0] > along[1] > along[2] and along[3] < along[4]
    still = decay_step(sketch, a0, b0, a0, b0)
    assert not still.step_a.any() and not still.step_b.any()
