"""Subspace iteration for a few extreme singular directions of a large layer. Pure.

A random block of vectors, slightly wider than the rank, is multiplied by the matrix and its transpose
until the energy it captures no longer changes (Halko, Martinsson and Tropp, arXiv 0909.4061, Section
4.5). The spectra of real layers decay quickly: the largest directions usually take two or three
rounds. The initial block is seeded, so results are reproducible.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .eigen import basis, gram, is_singular, largest_eigenvectors, orthonormal

# Stopping criteria: relative change of the captured energy in a round (ipm), and a bound of the
# energy in excess of the optimum (kpm; the measured excess is usually a fifth of it).
IPM_TOLERANCE = 1e-4
KPM_TOLERANCE = 4e-3
_MOST_ROUNDS = 30
# Least size and ratio size / rank at which iterating is faster
# (benchmarks/corda_start/crossover.py).
_LEAST_SIZE = 384
_LEAST_RATIO = {"ipm": 3, "kpm": 4}
_PROBES = 32
_SEED = 0


def is_faster(size: int, rank: int, method: str) -> bool:
    """Whether iterating is faster than computing all eigenpairs of a `size × size` matrix."""
    return size >= _LEAST_SIZE and rank * _LEAST_RATIO[method] <= size


def block_width(size: int, rank: int, method: str) -> int:
    """Number of vectors iterated to find `rank` directions of a `size × size` matrix.

    The smallest singular values of a real layer lie close together, so a wider block saves rounds.
    """
    return min(size, rank + max(16, rank // (2 if method == "kpm" else 4)))


def largest_left(weight: Tensor, factor: Tensor | None, rank: int) -> tuple[Tensor, Tensor, float]:
    """Finds left singular vectors of the largest singular values of `W F`, in float32 arithmetic.

    Args:
        weight: The weight `W (out, in)`.
        factor: The factor `F (in, in)`, or None for the identity.
        rank: Number of vectors.

    Returns:
        `U (out, rank)` in float64, largest first; its image `Uᵀ W F (rank, in)`; and `‖W F‖²`, the
        sum of the energy that the block captures and an estimate of the rest from 32 random probes.
    """
    weight = weight.float()
    width = block_width(min(weight.shape), rank, "ipm")
    forward, backward = _products(weight, factor, width)
    block = orthonormal(_random(weight.shape[1], width, weight))
    captured = gain = 0.0
    for _ in range(_MOST_ROUNDS):
        left = orthonormal(forward(block))
        right = backward(left)
        energies = torch.linalg.eigvalsh(gram(right.double())).flip(0)
        before, captured = captured, float(energies[:rank].sum())
        last, gain = gain, captured - before
        # Gains eventually fall by a constant factor, so a geometric series estimates the rest.
        rest = gain**2 / (last - gain) if gain < last else gain
        if max(gain, rest) <= IPM_TOLERANCE * captured:
            break
        block = orthonormal(right)
    rotation = largest_eigenvectors(gram(right.double()), rank)
    # In float32 the columns are orthonormal only to 1e-6.
    vectors = orthonormal(left.double() @ rotation)
    energy = float(energies.sum()) + _rest(left, forward, weight)
    return vectors, backward(vectors.float()).T, energy


def smallest_right(triangle: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Finds right singular vectors of the smallest singular values of `R`, in float64 arithmetic.

    The inverse of `Rᵀ R`, of which they are the largest directions, is applied by two triangular
    solves.

    Args:
        triangle: The upper triangular matrix `R (n, n)` in float64.
        rank: Number of vectors.

    Returns:
        The vectors `(n, rank)`, smallest first, and their singular values `(rank,)`.
    """
    if is_singular(triangle):
        return smallest_of_all(triangle, rank)
    width = block_width(len(triangle), rank, "kpm")
    # A new basis after each application, as two would exceed the precision of float64 in some
    # layers.
    block = _random(len(triangle), width, triangle)
    for _ in range(2):
        block = basis(_solved(triangle, _solved(triangle, block, transposed=True)))
    for rounds in range(2, _MOST_ROUNDS):
        half = _solved(triangle, block, transposed=True)
        inverse_energies = torch.linalg.eigvalsh(gram(half))
        # A round reduces the unwanted directions, with at least the block's largest energy, by this
        # factor.
        gain = float(inverse_energies[0] / inverse_energies[-rank]) ** 2
        eps = torch.finfo(triangle.dtype).eps
        if inverse_energies[-rank] <= 1e3 * len(triangle) * eps * inverse_energies[-1]:
            # If one direction is far smaller, the others are lost in rounding.
            return smallest_of_all(triangle, rank)
        if 0.5 * gain**rounds <= KPM_TOLERANCE:
            break
        block = basis(_solved(triangle, half))
    block, change = torch.linalg.qr(_solved(triangle, half))
    # R times the basis, from the product before orthogonalization.
    image = torch.linalg.solve_triangular(change, half, upper=True, left=False)
    squares, rotation = torch.linalg.eigh(gram(image))
    return block @ rotation[:, :rank], squares[:rank].clamp(min=0).sqrt()


def _solved(triangle: Tensor, block: Tensor, transposed: bool = False) -> Tensor:
    """Returns `R⁻¹ X`, or `R⁻ᵀ X` if transposed."""
    matrix = triangle.T if transposed else triangle
    return torch.linalg.solve_triangular(matrix, block, upper=not transposed)


def smallest_of_all(triangle: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As `smallest_right`, by a full singular value decomposition: slow, but valid for any matrix."""
    _, values, rows = torch.linalg.svd(triangle)
    return rows[-rank:].flip(0).T, values[-rank:].flip(0)


def _products(
    weight: Tensor, factor: Tensor | None, width: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Returns `X → W F X` and `Y → Fᵀ Wᵀ Y`; `W F` is formed if that costs less than a few rounds."""
    if factor is None:
        return lambda x: weight @ x, lambda y: weight.T @ y
    factor = factor.float()
    if weight.shape[0] < 6 * width:
        product = weight @ factor
        return lambda x: product @ x, lambda y: product.T @ y
    return lambda x: weight @ (factor @ x), lambda y: factor.T @ (weight.T @ y)


def _rest(left: Tensor, forward: Callable[[Tensor], Tensor], weight: Tensor) -> float:
    """Estimates the energy of `W F` outside the span of `left`, from random probes."""
    probed = forward(_random(weight.shape[1], _PROBES, weight))
    outside = probed - left @ (left.T @ probed)
    return float(outside.double().square().sum()) / _PROBES


def _random(rows: int, columns: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(rows, columns, generator=generator).to(
        like
    )  # drawing in float64 takes three times as long
