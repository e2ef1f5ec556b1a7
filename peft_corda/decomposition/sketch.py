"""Sketches of a layer's inputs: a few rows `S (k, in)` that stand for the covariance `C`. Pure.

`Sᵀ S` has the expectation `C`, so `‖S ΔWᵀ‖²` estimates `tr(ΔW C ΔWᵀ)`, the mean of `‖ΔW x‖²` over the
calibration data's inputs `x`, without these inputs and without `C`.

Half of the rows hold the leading directions of `C`, exactly; the other half is random and stands for
the rest. Of a random row alone the estimate would have a relative standard error of up to `√2`; that of
`k` rows is at most `√(2/k)`, and far less where an update has many directions or `C` has few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kprune_ext.common.precision import exact_products

from . import subspace_iteration as iterative
from .eigen import largest_eigenvectors, orthonormal
from .low_rank import Product

#: Default number of rows.
ROWS = 64
_SEED = 0
# Up to this size a full eigendecomposition is cheap, and needs no jitter.
_SMALL = 256
# Relative to each diagonal entry, what makes a covariance with rounding errors positive definite.
_JITTERS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True, eq=False)
class InputSketch:
    """Sketch of the inputs of a group of layers.

    Attributes:
        rows: The rows `S (k, in)`, in bfloat16.
        energy: The exact mean `tr C` of `‖x‖²`.
    """

    rows: Tensor
    energy: float

    def bytes(self) -> int:
        """Returns the memory of the rows in bytes."""
        return self.rows.numel() * self.rows.element_size()


def sketch_of(covariance: Tensor, rows: int) -> InputSketch:
    """Returns a sketch of a covariance `C (in, in)`, the same for the same `C`.

    With as many rows as dimensions it is exact.

    Args:
        covariance: The undamped covariance, in float32 or float64. It is left as it was.
        rows: Number of rows, at least 1; no more are made than `C` has dimensions.
    """
    energy = float(covariance.diagonal().double().sum())
    with exact_products(covariance.device):
        found = _rows_of(covariance, min(rows, len(covariance)))
    return InputSketch(found.bfloat16(), energy)


def _rows_of(covariance: Tensor, rows: int) -> Tensor:
    size, leading = len(covariance), rows // 2
    if size <= max(_SMALL, rows):
        values, vectors = torch.linalg.eigh(covariance.double())
        factor = (vectors * values.clamp(min=0).sqrt()).flip(1).T  # F (in, in), with Fᵀ F = C
        if rows == size:
            return factor
        return torch.cat([factor[:leading], _mixed(factor[leading:], rows - leading)])
    triangle = _triangle_of(covariance)
    if iterative.is_faster(size, leading, "ipm"):
        top = iterative.largest_left(covariance.float(), None, leading)[0].to(triangle)
    else:
        top = largest_eigenvectors(covariance.double(), leading).to(triangle)
    # Exact for any basis `top`: what lies outside of it in the space of the factor is random.
    inside = orthonormal(triangle.T @ top)
    random = _random(size, rows - leading, triangle)
    random -= inside @ (inside.T @ random)
    return torch.cat([inside.T, random.T / (rows - leading) ** 0.5]) @ triangle.T


def _mixed(factor: Tensor, rows: int) -> Tensor:
    """Random combinations of the rows of a factor, with the same expected Gram matrix."""
    return _random(len(factor), rows, factor).T @ factor / rows**0.5


def _triangle_of(covariance: Tensor) -> Tensor:
    """A lower triangular `L (in, in)` in float32 with `L Lᵀ = C`, but for a jitter of its diagonal."""
    roots = covariance.diagonal().clamp(min=0).sqrt().float()
    divisors = torch.where(roots > 0, roots, torch.ones_like(roots))
    info = torch.empty((), dtype=torch.int32, device=covariance.device)
    for jitter in _JITTERS:
        scaled = covariance.float() / divisors
        scaled /= divisors[:, None]
        scaled.diagonal().fill_(1 + jitter)
        torch.linalg.cholesky_ex(scaled, out=(scaled, info))
        if not info:
            break
    else:
        values, vectors = torch.linalg.eigh(covariance.double())
        return (vectors * values.clamp(min=0).sqrt()).float()
    return scaled.mul_(roots[:, None])


def _random(size: int, count: int, like: Tensor) -> Tensor:
    """Independent entries of ±1, for which such estimates have the least variance."""
    return signs(size, count, _SEED).to(like)


def signs(rows: int, columns: int, seed: int) -> Tensor:
    """Returns independent signs ±1, `(rows, columns)` in float32 on the CPU, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (rows, columns), generator=generator).float().mul_(2).sub_(1)


def update_energy(sketch: Tensor, update: Product) -> Tensor:
    """Estimates `tr(ΔW C ΔWᵀ)`, the mean of `‖ΔW x‖²`.

    Args:
        sketch: The rows `S (k, in)`.
        update: The update `ΔW = L R`, as `L (out, r)` and `R (r, in)`.

    Returns:
        A scalar tensor.
    """
    left, right = update
    return ((sketch.to(right) @ right.T) @ left.T).square().sum()


def output_energy(sketch: InputSketch, weight: Tensor) -> float:
    """Estimates `tr(W C Wᵀ)`, the mean of `‖W x‖²`, of a weight `W (out, in)`."""
    rows = sketch.rows.to(weight.device, torch.float32)
    return float((rows @ weight.float().T).double().square().sum())


@dataclass(frozen=True, eq=False)
class DecayStep:
    """A step of an adapter's factors that lowers the energy of its update.

    Attributes:
        step_a: Step of `A (r, in)` to the minimum along the gradient, to be subtracted.
        step_b: Step of `B (out, r)`, likewise.
    """

    step_a: Tensor
    step_b: Tensor


def decay_step(
    sketch: Tensor, factor_a: Tensor, factor_b: Tensor, start_a: Tensor, start_b: Tensor
) -> DecayStep:
    """The step against the gradient of `½ ‖S ΔWᵀ‖²`, `ΔW = B A − B0 A0`, to the minimum along it.

    The minimum is that of the update linearised in the step. For `½ ‖θ‖²` in place of it, the step
    would be `θ` itself, so a share `lr · λ` of the step is what AdamW's decay takes of `θ`.

    Args:
        sketch: The rows `S (k, in)`, in the dtype of the computation.
        factor_a: The factor `A (r, in)`.
        factor_b: The factor `B (out, r)`.
        start_a: Its start `A0 (r, in)`; zeros for a plain LoRA.
        start_b: Its start `B0 (out, r)`; zeros for a plain LoRA.

    Returns:
        The whole step, which is zero if the update is.
    """
    inside = sketch @ factor_a.T  # S Aᵀ
    moved = inside @ (factor_b - start_b).T + (sketch @ (factor_a - start_a).T) @ start_b.T
    gradient_b = moved.T @ inside
    gradient_a = (moved @ factor_b).T @ sketch
    change = inside @ gradient_b.T + (sketch @ gradient_a.T) @ factor_b.T
    squares = change.square().sum()
    length = (moved * change).sum() / squares.clamp(min=torch.finfo(squares.dtype).tiny)
    return DecayStep(length * gradient_a, length * gradient_b)
