"""CorDA written naively in float64 straight from the paper (arXiv 2406.05223, Section 3).

Slow, with an explicit inverse and a full decomposition; what the package is compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor


def covariance(sequences: list[Tensor]) -> Tensor:
    """`Σ x xᵀ / tokens` over sequences `(tokens, in)`, one token at a time."""
    features = sequences[0].shape[-1]
    total = torch.zeros(features, features, dtype=torch.float64)
    tokens = 0
    for sequence in sequences:
        for x in sequence.double():
            total += torch.outer(x, x)
            tokens += 1
    return total / tokens


def damp(matrix: Tensor, damping: float = 0.01) -> Tensor:
    matrix = matrix.double()
    return matrix + damping * matrix.diag().mean() * torch.eye(len(matrix), dtype=torch.float64)


def adapter(weight: Tensor, damped: Tensor, rank: int, method: str) -> tuple[Tensor, Tensor]:
    """`A (r, in)` and `B (out, r)` of eqs. 3 to 7: SVD of `W C`, then `√S_r V_rᵀ C⁻¹`."""
    weight, damped = weight.double(), damped.double()
    left, values, right = torch.linalg.svd(weight @ damped, full_matrices=False)
    keep = slice(0, rank) if method == "ipm" else slice(len(values) - rank, None)
    root = values[keep].sqrt()
    factor_b = left[:, keep] * root
    factor_a = root[:, None] * right[keep] @ torch.linalg.inv(damped)
    return factor_a, factor_b
