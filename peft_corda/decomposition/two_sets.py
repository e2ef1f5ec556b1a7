"""Starts that keep and learn: from two sets of data, or from directions that the inputs lack. Pure.

- SC-LoRA (arXiv 2505.23724): with outputs `y = W x`, the directions `U_r` of the output space that
  maximize `(1 − β) E_task ‖Uᵀ y‖² − β E_keep ‖Uᵀ y‖²` are the eigenvectors of the largest eigenvalues of
  `(1 − β) W C_task Wᵀ − β W C_keep Wᵀ`. The adapter starts as `U_r U_rᵀ W`.
- LoRA-Null (arXiv 2503.02659): with `V_r` the eigenvectors of the smallest eigenvalues of `C`, the
  adapter starts as `W V_r V_rᵀ`, which the inputs of the data hardly reach.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import subspace_iteration as iterative
from .directions import Directions
from .eigen import largest_eigenvectors
from .triangular import thin_rows


def contrasted(
    weight: Tensor, task: Tensor, keep: Tensor, rank: int, beta: float
) -> tuple[Directions, float]:
    """Directions in which the outputs for a task are large, and those for what is to be kept small.

    They are found in float64, in full. If `W` is tall, directions that its outputs cannot have are left
    out, since the adapter could not start from them.

    Args:
        weight: The weight `W (out, in)`.
        task: Covariance `C_task (in, in)` of the inputs of the task.
        keep: Covariance `C_keep (in, in)` of the inputs of what is to be kept.
        rank: Number of directions, at most `min(out, in)`.
        beta: The weight `β` of what is to be kept, between 0 and 1.

    Returns:
        The directions, with `S_i² = u_iᵀ W C_task Wᵀ u_i`, and the energy `tr(W C_task Wᵀ)`.
    """
    rows, lift = thin_rows(weight)
    rows = rows.double()
    learned = rows @ task.to(rows) @ rows.T
    contrast = (1 - beta) * learned - beta * (rows @ keep.to(rows) @ rows.T)
    thin = largest_eigenvectors((contrast + contrast.T) / 2, rank)
    energies = ((learned @ thin) * thin).sum(dim=0).clamp(min=0)
    found = Directions(
        U=lift(thin).float(),
        S=energies.sqrt().float(),
        weight_norms=(thin.T @ rows).norm(dim=1).float(),
    )
    return found, float(learned.trace())


def least_inputs(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The directions of the inputs that the data uses least.

    Args:
        covariance: The covariance `C (in, in)`, damped, so that it is positive definite.
        rank: Number of directions, at most `in`.

    Returns:
        The eigenvectors `V (in, rank)` in float64, least first, and the roots of their eigenvalues.
    """
    covariance = covariance.double()
    if iterative.is_faster(len(covariance), rank, "kpm"):
        triangle, failed = torch.linalg.cholesky_ex(covariance, upper=True)
        if not failed:
            return iterative.smallest_right(triangle, rank)
    values, vectors = torch.linalg.eigh(covariance)
    return vectors[:, :rank], values[:rank].clamp(min=0).sqrt()


def null_directions(weight: Tensor, vectors: Tensor, values: Tensor) -> Directions:
    """Directions of LoRA-Null for one of the layers that share an input.

    Args:
        weight: The weight `W (out, in)`.
        vectors: The vectors `V (in, rank)` from `least_inputs`.
        values: The roots of their eigenvalues.

    Returns:
        Directions whose `U` is `V (in, rank)`, of the input space, and whose `weight_norms` are
        `‖W v_i‖`.
    """
    norms = (weight.float() @ vectors.to(weight.device, torch.float32)).norm(dim=0)
    return Directions(vectors.float(), values.float(), norms)
