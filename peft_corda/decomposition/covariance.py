"""Statistics accumulated per linear layer during calibration. Pure: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kprune_ext.common.precision import (
    add_product,
    add_rows,
    addable_parts,
    mirror_lower,
    rounded_like,
)

from .eigen import energy_of
from .sketch import InputSketch, signs


@dataclass(frozen=True, eq=False)
class Covariance:
    """Mean outer product of a layer's inputs, `C = Σ x xᵀ / tokens` (CorDA, Section 3.1).

    It is not centered, as in the paper, because the layer also acts on the mean of its inputs.

    Attributes:
        matrix: The matrix `C (in, in)`, symmetric.
        tokens: Number of input rows in the sum.
    """

    matrix: Tensor
    tokens: int


class CovarianceAccumulator:
    """Sums `x xᵀ` over batches; `finish` divides by the number of tokens.

    Every token has the same weight, regardless of its batch.

    Args:
        features: Input dimensions.
        device: Device of the sums.
        dtype: Dtype of products and sums, whatever the dtype of the inputs.

    Attributes:
        sum: The sum `(features, features)`; only blocks on and below the diagonal are updated.
        tokens: Number of rows added so far.
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
        """Adds inputs of shape `(tokens, in)`."""
        add_rows(self.sum, inputs.detach())
        self.tokens += inputs.shape[0]

    def restore(self, total: Tensor, tokens: int) -> None:
        """Continues from saved sums."""
        self.sum.copy_(total)
        self.tokens = tokens

    def reduce(self, add: Callable[[Tensor], Tensor]) -> None:
        """Sums the statistics over several processes.

        Args:
            add: Returns the sum of a tensor over all processes.
        """
        self.sum = add(self.sum)
        self.tokens = int(add(torch.tensor(self.tokens)))

    def energy(self) -> Tensor:
        """Returns the sum of squares so far, a scalar tensor, not finite if any input was not."""
        return self.sum.diagonal().sum()

    def finish(self) -> Covariance:
        """Returns the mean outer product, computed in the memory of the accumulator, which it ends.

        Raises:
            ValueError: If no token was added.
        """
        if self.tokens == 0:
            raise ValueError("No token was added, so the mean outer product is undefined.")
        # In place, as the sums may be most of the memory in use.
        return Covariance(mirror_lower(self.sum).div_(self.tokens), self.tokens)


@dataclass(frozen=True, eq=False)
class CrossCovariance:
    """Mean outer product of a layer's outputs and inputs, `Σ y xᵀ / tokens = W C`.

    Attributes:
        matrix: The matrix `W C (out, in)`.
        energy: Mean of the diagonal of `C`.
        tokens: Number of rows in the sum.
        sketch: Sketch of the inputs; None if none was collected.
    """

    matrix: Tensor
    energy: float
    tokens: int
    sketch: InputSketch | None = None


class CrossAccumulator(CovarianceAccumulator):
    """Sums `y xᵀ` over batches, in an additional row the squares of `x`, and a sketch of `x`.

    The sketch takes `probes` more rows, `Σ g xᵀ` with independent random signs `g` for each token.

    Args:
        features: Input dimensions.
        outputs: Output dimensions.
        device: As for `CovarianceAccumulator`.
        dtype: As for `CovarianceAccumulator`.
        probes: Number of rows of the sketch; 0 for none.
        stream: Number of this process, as the signs of processes must differ.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        probes: int = 0,
        stream: int = 0,
    ) -> None:
        self.sum = torch.zeros(outputs + 1 + probes, features, dtype=dtype, device=device)
        self.tokens = 0
        self._outputs, self._probes, self._stream = outputs, probes, stream

    def restore(self, total: Tensor, tokens: int) -> None:
        if len(total) < len(self.sum):  # by version 0.1, without a sketch
            self.sum, self._probes = self.sum[: len(total)], 0
        super().restore(total, tokens)

    def update_pair(self, inputs: Tensor, outputs: Tensor) -> None:
        """Adds inputs `(tokens, in)` and their outputs `(tokens, out)`, without the bias."""
        allowed = rounded_like(inputs)
        inputs, outputs = inputs.detach(), outputs.detach()
        if inputs.dtype != outputs.dtype:
            inputs, outputs = inputs.to(self.sum.dtype), outputs.to(self.sum.dtype)
        parts = zip(addable_parts(self.sum, inputs), addable_parts(self.sum, outputs), strict=True)
        with allowed:
            for rows, given in parts:
                add_product(self.sum[: self._outputs], given.T, rows)
                self.sum[self._outputs] += rows.to(self.sum.dtype).square().sum(dim=0)
            if self._probes and len(inputs):
                seed = (self._stream << 40) + self.tokens
                probes = signs(self._probes, len(inputs), seed).to(inputs.device, self.sum.dtype)
                self.sum[self._outputs + 1 :] += probes @ inputs.to(self.sum.dtype)
        self.tokens += inputs.shape[0]

    def energy(self) -> Tensor:
        return self.sum[self._outputs].sum()

    def finish(self) -> CrossCovariance:  # type: ignore[override]
        if self.tokens == 0:
            raise ValueError("No token was added, so the mean outer product is undefined.")
        mean = self.sum[: self._outputs + 1] / self.tokens
        squares, sketch = mean[-1].double(), None
        if self._probes:
            rows = self.sum[self._outputs + 1 :] / (self.tokens * self._probes) ** 0.5
            sketch = InputSketch(rows.bfloat16(), float(squares.sum()))
        return CrossCovariance(mean[:-1], float(squares.mean()), self.tokens, sketch)


def damped_cross(cross: CrossCovariance, weight: Tensor, damping: float) -> Tensor:
    """`W (C + damping · mean(diag C) · I)`, `(out, in)` in float32; `W` if every input was zero."""
    if cross.energy == 0:
        return weight.float()
    return cross.matrix.float() + damping * cross.energy * weight.float()


def effective_rank(covariance: Tensor) -> float:
    """Effective number of directions of the inputs' energy, `(tr C)² / ‖C‖²`, between 1 and `in`.

    It is the participation ratio of the eigenvalues, computed without an eigendecomposition.
    """
    trace, squares = float(covariance.diagonal().double().sum()), energy_of(covariance)
    return trace**2 / squares if squares > 0 else 0.0


def damped(
    covariance: Tensor, damping: float, dtype: torch.dtype = torch.float64, reuse: bool = False
) -> Tensor:
    """`C + damping · mean(diag C) · I`, `(in, in)`, in `dtype`.

    With `reuse`, the memory of the covariance is taken for it where the dtype allows.

    Damping makes `C` positive definite even with fewer tokens than dimensions. A covariance of zeros
    (of a layer with only zero inputs) becomes the identity, so that the weight itself is decomposed.
    """
    matrix = covariance.to(dtype, copy=not reuse)
    level = float(matrix.diagonal().double().mean())
    if level == 0:
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    matrix.diagonal().add_(damping * level)
    return matrix
