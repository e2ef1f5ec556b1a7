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

    If the root has at most `limit` columns, they are the vectors, and the sum is exact. Otherwise the
    longest columns of a sample are vectors of their own, as far as that lowers the variance, and each of
    the remaining vectors is the sum of all other columns with random signs, which is correct in
    expectation (Hutchinson's estimator). A sample's signs depend only on its seed.

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
    squares = (_column_squares(z, problem, temperature) * weight).flatten(1)
    order, alone = _columns_alone(squares, limit)
    places = torch.arange(limit - 1, device=z.device)
    others = torch.ones_like(squares).scatter(1, order, (places >= alone).to(z.dtype))
    others = others.reshape(batch, positions, width)
    scale = (limit - alone).to(z.dtype).sqrt()
    signs = torch.stack([_signs(seed, limit, positions + width) for seed in seeds]).to(z.device)
    for number in range(limit):
        drawn = signs[:, number].to(z.dtype)
        r = (drawn[:, :positions] / scale).unsqueeze(2) * drawn[:, None, positions:] * others
        if number < limit - 1:
            one = torch.zeros_like(squares).scatter(1, order[:, number, None], 1.0)
            r = torch.where((number < alone).unsqueeze(2), one.reshape(r.shape), r)
        yield root_times(z, problem, temperature, r) * weight


def _column_squares(z: Tensor, problem: ProblemType, temperature: float) -> Tensor:
    """Returns the squared lengths of the columns of R, `(batch, positions, components)`."""
    z = z / temperature
    if problem == "regression":
        return torch.full_like(z, 2.0)
    if problem == "multi_label_classification":
        return z.sigmoid() * (-z).sigmoid()
    if z.shape[2] == 2:
        difference = z[..., 1:] - z[..., :1]
        return 2 * difference.sigmoid() * (-difference).sigmoid()
    p = z.softmax(2)
    return p * (1 - 2 * p + p.square().sum(2, keepdim=True)).clamp(min=0)


def _columns_alone(squares: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Chooses the columns that are vectors of their own.

    With m of them, the variance of the others' part is in proportion to the sum of the products of any
    two of the others' squares, divided by the `limit` − m vectors that are drawn.

    Args:
        squares: Squared lengths of the columns, `(batch, columns)`, with more than `limit` columns.
        limit: Number of vectors.

    Returns:
        The longest columns, `(batch, limit - 1)`, and how many of them stand alone, `(batch, 1)`.
    """
    longest, order = squares.topk(limit - 1)
    numbers = torch.arange(limit, device=squares.device)

    def left(values: Tensor, largest: Tensor) -> Tensor:
        taken = torch.nn.functional.pad(largest.cumsum(1, dtype=torch.float64), (1, 0))
        return values.sum(1, keepdim=True, dtype=torch.float64) - taken

    products = left(squares, longest).square() - left(squares.square(), longest.square())
    return order, (products / (limit - numbers)).argmin(1, keepdim=True)


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
