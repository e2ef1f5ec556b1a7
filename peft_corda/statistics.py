"""What is accumulated per linear layer during calibration. Pure: tensors in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# How a symmetric product is cut into rows of blocks.
_BLOCKS = 8
_LEAST_BLOCK = 192


@dataclass(frozen=True, eq=False)
class Covariance:
    """Mean outer product of a layer's inputs, `C = Σ x xᵀ / tokens` (CorDA, Section 3.1).

    Not centred, as in the paper: the mean of the inputs is part of what the layer is used for.

    Attributes:
        matrix: `(in, in)`, symmetric.
        tokens: number of input rows summed over.
    """

    matrix: Tensor
    tokens: int


class CovarianceAccumulator:
    """Sums `x xᵀ` over batches; `finish` divides by the number of tokens.

    Products and sums are float32 whatever the dtype of the inputs. Every token has the same weight,
    in whichever batch it comes.
    """

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        self._sum = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add inputs of shape `(tokens, in)`."""
        rows = inputs.detach().to(torch.float32)
        columns = rows.T.contiguous()
        features = rows.shape[1]
        # Only blocks on and below the diagonal: nearly half of a plain product is saved.
        step = max(_LEAST_BLOCK, -(-features // _BLOCKS))
        for start in range(0, features, step):
            stop = start + step
            self._sum[start:stop, :stop].addmm_(columns[start:stop], rows[:, :stop])
        self.tokens += rows.shape[0]

    def energy(self) -> Tensor:
        """Sum of squares so far, a scalar tensor: not finite once an input was not."""
        return self._sum.diagonal().sum()

    def finish(self) -> Covariance:
        """The mean outer product.

        Raises:
            ValueError: if nothing was added.
        """
        if self.tokens == 0:
            raise ValueError("no token was added, so there is no mean outer product")
        lower = torch.tril(self._sum)
        return Covariance((lower + torch.tril(lower, -1).T) / self.tokens, self.tokens)


def damped(covariance: Tensor, damping: float) -> Tensor:
    """`C + damping · mean(diag C) · I` in float64, `(in, in)`.

    Keeps `C` positive definite with fewer tokens than dimensions. A covariance of zeros (a layer
    that only ever saw zeros) becomes the identity, which makes the decomposition that of the weight.
    """
    matrix = covariance.double()
    level = matrix.diagonal().mean()
    if level == 0:
        return torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return matrix + damping * level * torch.eye(
        matrix.shape[0], dtype=matrix.dtype, device=matrix.device
    )
