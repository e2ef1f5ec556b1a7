"""Square roots of the divergence's second derivative, exact and by random signs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kprune_ext.architectures.tasks import PROBLEM_TYPES
from kprune_ext.knowledge.fisher import components, directions, divergence_gradient, root_times

TEMPERATURE = 2.0


def divergence(z: Tensor, teacher: Tensor, problem: str) -> Tensor:
    """The distance L of two predictions ``(positions, classes)``, written out."""
    a, b = teacher / TEMPERATURE, z / TEMPERATURE
    if problem == "regression":
        return (z - teacher).square().sum()
    if problem == "multi_label_classification":
        p, q = a.sigmoid(), b.sigmoid()
        distance = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    else:
        distance = a.softmax(1) * (a.log_softmax(1) - b.log_softmax(1))
    return TEMPERATURE**2 * distance.sum()


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_directions_square_to_the_second_derivative(problem: str, classes: int) -> None:
    z = torch.randn(1, 3, classes).double()
    counted = torch.tensor([[True, False, True]])
    hessian = torch.autograd.functional.hessian(lambda x: divergence(x, z[0], problem), z[0])
    weight = counted[0].double().repeat_interleave(classes)
    expected = weight.unsqueeze(1) * hessian.reshape(3 * classes, -1) * weight
    found = torch.zeros_like(expected)
    for direction in directions(z, counted, problem, TEMPERATURE, 100, [0]):
        found += torch.outer(direction.flatten(), direction.flatten())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_random_signs_are_right_in_the_mean(problem: str) -> None:
    z, counted = torch.randn(1, 4, 6).double(), torch.ones(1, 4, dtype=torch.bool)

    def squares(limit: int, seed: int) -> Tensor:
        total = torch.zeros(24, 24).double()
        for direction in directions(z, counted, problem, TEMPERATURE, limit, [seed]):
            total += torch.outer(direction.flatten(), direction.flatten())
        return total

    exact = squares(1000, 0)
    estimates = torch.stack([squares(8, seed) for seed in range(400)])
    error = estimates.mean(0) - exact
    assert error.norm() < 0.15 * exact.norm()
    assert (estimates[0] - exact).norm() > 0.3 * exact.norm()  # one alone is far off


def test_likely_classes_are_directions_of_their_own() -> None:
    """Start and end of an answer among 40 tokens, of which three are likely for each."""
    z = torch.full((1, 2, 40), -12.0).double()
    z[0, 0, [3, 9, 30]] = torch.tensor([1.0, 0.5, 0.0]).double()
    z[0, 1, [4, 11, 31]] = torch.tensor([0.0, 0.4, 2.0]).double()
    counted, problem = torch.ones(1, 2, dtype=torch.bool), "single_label_classification"

    def squares(limit: int) -> Tensor:
        found = [d.flatten() for d in directions(z, counted, problem, 1.0, limit, [0])]
        assert len(found) == min(limit, 80)
        return sum(torch.outer(one, one) for one in found)

    exact = squares(80)
    assert (squares(8) - exact).norm() < 0.01 * exact.norm()
    assert (squares(2) - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("limit", [1, 8])
def test_samples_with_different_predictions_share_passes(limit: int) -> None:
    """A certain sample, an undecided one and one between them: each as if it were alone."""
    problem = "single_label_classification"
    z = torch.stack([30.0 * torch.eye(2, 20), torch.zeros(2, 20), torch.randn(2, 20)]).double()
    counted = torch.tensor([[True, True], [True, True], [True, False]])
    together = list(directions(z, counted, problem, 1.0, limit, [1, 2, 3]))
    for row in range(3):
        own = (z[row : row + 1], counted[row : row + 1])
        alone = list(directions(*own, problem, 1.0, limit, [row + 1]))
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[row : row + 1], other)


def test_signs_belong_to_the_sample() -> None:
    z, counted = torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool)
    together = list(directions(z, counted, "regression", 1.0, 5, [7, 8, 9]))
    assert len(together) == 5
    alone = list(directions(z[1:2], counted[1:2], "regression", 1.0, 5, [8]))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[1:2], other)
    assert not torch.equal(together[0][0], together[0][1])


def test_two_exclusive_classes_take_one_direction() -> None:
    assert components("single_label_classification", 2) == 1
    assert components("regression", 2) == 2
    z = torch.tensor([[[-60.0, 60.0]]])  # a certain prediction has no information
    assert root_times(z, "single_label_classification", 1.0, torch.ones(1, 1, 1)).abs().max() < 1e-9


@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_gradient_of_the_divergence(problem: str) -> None:
    z, teacher = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    expected = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda x, b=b: divergence(x, teacher[b], problem), z[b]
            )
            for b in range(2)
        ]
    )
    found = divergence_gradient(z, teacher, problem, TEMPERATURE)
    torch.testing.assert_close(found, expected)
