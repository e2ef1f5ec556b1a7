"""What is accumulated per linear layer during calibration. Pure: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from kprune_ext.common.precision import exact_products

from .eigen import add_lower_gram, energy_of, mirror_lower


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

    Every token has the same weight, in whichever batch it comes.

    Args:
        features: input dimensions.
        device: where sums are kept.
        dtype: that products and sums are worked out in, whatever the dtype of the inputs.

    Attributes:
        sum: `(features, features)`; only blocks on and below the diagonal are kept up.
        tokens: rows added so far.
    """

    def __init__(
        self,
        features: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sum = torch.zeros(features, features, dtype=dtype, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add inputs of shape `(tokens, in)`."""
        with _rounded_like(inputs):
            add_lower_gram(self.sum, inputs.detach().to(self.sum.dtype))
        self.tokens += inputs.shape[0]

    def restore(self, total: Tensor, tokens: int) -> None:
        """Go on from sums that were kept."""
        self.sum.copy_(total)
        self.tokens = tokens

    def reduce(self, add: Callable[[Tensor], Tensor]) -> None:
        """Add up what several processes have.

        Args:
            add: gives the sum of a tensor over all of them.
        """
        self.sum = add(self.sum)
        self.tokens = int(add(torch.tensor(self.tokens)))

    def energy(self) -> Tensor:
        """Sum of squares so far, a scalar tensor: not finite once an input was not."""
        return self.sum.diagonal().sum()

    def finish(self) -> Covariance:
        """The mean outer product; ends the accumulator, whose memory it takes over.

        Raises:
            ValueError: if nothing was added.
        """
        if self.tokens == 0:
            raise ValueError("no token was added, so there is no mean outer product")
        # In place: the sums may be most of the memory in use.
        return Covariance(mirror_lower(self.sum).div_(self.tokens), self.tokens)


@dataclass(frozen=True, eq=False)
class CrossCovariance:
    """Mean outer product of a layer's outputs and inputs, `Σ y xᵀ / tokens = W C`.

    Attributes:
        matrix: `(out, in)`.
        energy: mean of the diagonal of `C`.
        tokens: number of rows summed over.
    """

    matrix: Tensor
    energy: float
    tokens: int


class CrossAccumulator(CovarianceAccumulator):
    """Sums `y xᵀ` over batches, and in a last row the squares of `x`.

    Args:
        features: input dimensions.
        outputs: output dimensions.
        device, dtype: as for `CovarianceAccumulator`.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sum = torch.zeros(outputs + 1, features, dtype=dtype, device=device)
        self.tokens = 0

    def update_pair(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add inputs `(tokens, in)` and the outputs `(tokens, out)` for them, without bias."""
        rows = inputs.detach().to(self.sum.dtype)
        with _rounded_like(inputs):
            self.sum[:-1].addmm_(outputs.detach().to(self.sum.dtype).T, rows)
        self.sum[-1] += rows.square().sum(dim=0)
        self.tokens += rows.shape[0]

    def energy(self) -> Tensor:
        return self.sum[-1].sum()

    def finish(self) -> CrossCovariance:  # type: ignore[override]
        if self.tokens == 0:
            raise ValueError("no token was added, so there is no mean outer product")
        mean = self.sum / self.tokens
        return CrossCovariance(mean[:-1], float(mean[-1].double().mean()), self.tokens)


def damped_cross(cross: CrossCovariance, weight: Tensor, damping: float) -> Tensor:
    """`W (C + damping · mean(diag C) · I)`, `(out, in)` in float32; `W` if every input was zero."""
    if cross.energy == 0:
        return weight.float()
    return cross.matrix.float() + damping * cross.energy * weight.float()


def _rounded_like(inputs: Tensor) -> AbstractContextManager[None]:
    # 16-bit inputs fit into TensorFloat-32 without loss, and use it.
    return exact_products(inputs.device, inputs.dtype in (torch.bfloat16, torch.float16))


def effective_rank(covariance: Tensor) -> float:
    """`(tr C)² / ‖C‖²`, between 1 and `in`: over how many directions the inputs' energy is spread.

    The participation ratio of the eigenvalues, which needs none of them.
    """
    trace, squares = float(covariance.diagonal().double().sum()), energy_of(covariance)
    return trace**2 / squares if squares > 0 else 0.0


def damped(covariance: Tensor, damping: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """`C + damping · mean(diag C) · I`, `(in, in)`, in `dtype`.

    Keeps `C` positive definite with fewer tokens than dimensions. A covariance of zeros (a layer
    that only ever saw zeros) becomes the identity, which makes the decomposition that of the weight.
    """
    matrix = covariance.to(dtype, copy=True)
    level = float(matrix.diagonal().double().mean())
    if level == 0:
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    matrix.diagonal().add_(damping * level)
    return matrix
