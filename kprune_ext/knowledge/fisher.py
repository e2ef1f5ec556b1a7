"""Sensitivity of predictions to small changes: square roots of the divergence's second derivative.

Logits z are `(batch, positions, classes)`. L is the distance between the softened predictions of
two models, summed over a sample's positions: T² times the Kullback-Leibler divergence for classes
(single label: a softmax; multi-label: a Bernoulli variable per label), the squared error for
regression. Its second derivative H with respect to the logits of the model being pruned does not
depend on the other model: diag(p) − p pᵀ, diag(p (1 − p)) or 2 I per position.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..architectures.tasks import ProblemType


def components(problem: ProblemType, classes: int) -> int:
    """Returns the number of columns of R in H = R Rᵀ at one position; 1 for two exclusive classes."""
    return 1 if problem == "single_label_classification" and classes == 2 else classes


def root_times(z: Tensor, problem: ProblemType, temperature: float, r: Tensor) -> Tensor:
    """Computes R r with R Rᵀ = H, position by position.

    For softmax, R = diag(√p) − p √pᵀ.

    Args:
        z: Logits, `(batch, positions, classes)`.
        problem: Problem type of the logits.
        temperature: Temperature T.
        r: Vectors `(batch, positions, components)`, with the number from `components`.

    Returns:
        Products, `(batch, positions, classes)`.
    """
    if problem == "regression":
        return 2**0.5 * r.expand_as(z)
    if problem == "multi_label_classification":
        return ((z / temperature).sigmoid() * (-z / temperature).sigmoid()).sqrt() * r
    if z.shape[2] == 2:
        difference = (z[..., 1:] - z[..., :1]) / temperature
        spread = (difference.sigmoid() * (-difference).sigmoid()).sqrt() * r
        return torch.cat([-spread, spread], dim=2)
    p = (z / temperature).softmax(2)
    weighted = p.sqrt() * r
    return weighted - p * (p.sqrt() * r).sum(2, keepdim=True)


def directions(
    z: Tensor,
    counted: Tensor,
    problem: ProblemType,
    temperature: float,
    limit: int,
    seeds: list[int],
) -> Iterator[Tensor]:
    """Yields vectors v with E[Σ v vᵀ] = H for every sample, over all of its positions at once.

    If the root has at most `limit` columns, they are the vectors, and the sum is exact. Otherwise
    each of `limit` vectors is the sum of all columns with random signs, which is correct in
    expectation (Hutchinson's estimator); a sample's signs depend only on its seed.

    Args:
        z: Logits, `(batch, positions, classes)`, without gradient.
        counted: Bool mask of the positions that count, `(batch, positions)`.
        problem: Problem type of the logits.
        temperature: Temperature T.
        limit: Largest number of vectors.
        seeds: One seed per sample.

    Yields:
        Vectors, `(batch, positions, classes)`.
    """
    batch, positions, classes = z.shape
    width = components(problem, classes)
    weight = counted.unsqueeze(2).to(z.dtype)
    if positions * width <= limit:
        for position in range(positions):
            for column in range(width):
                r = z.new_zeros(batch, positions, width)
                r[:, position, column] = 1
                yield root_times(z, problem, temperature, r) * weight
        return
    signs = torch.stack([_signs(seed, limit, positions + width) for seed in seeds]).to(z.device)
    for number in range(limit):
        drawn = signs[:, number].to(z.dtype) / limit**0.5
        r = drawn[:, :positions, None] * signs[:, number, None, positions:].to(z.dtype)
        yield root_times(z, problem, temperature, r) * weight


def _signs(seed: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.int8) - 1


def divergence_gradient(
    z: Tensor, teacher: Tensor, problem: ProblemType, temperature: float
) -> Tensor:
    """Returns ∂L/∂z, where L is the distance of the predictions from the teacher's.

    It is T (p − p_teacher) for softmax and Bernoulli, 2 (z − z_teacher) for regression.

    Args:
        z: Logits, `(batch, positions, classes)`.
        teacher: Logits of the teacher, of the same shape.
        problem: Problem type of the logits.
        temperature: Temperature T.
    """
    if problem == "regression":
        return 2 * (z - teacher)
    if problem == "multi_label_classification":
        return temperature * ((z / temperature).sigmoid() - (teacher / temperature).sigmoid())
    return temperature * ((z / temperature).softmax(2) - (teacher / temperature).softmax(2))
