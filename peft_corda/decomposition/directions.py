"""Directions of a weight, from the covariance of its inputs. Pure.

Notation: weight `W (out, in)`, damped covariance `C (in, in)`, `W C = U S Vᵀ` (CorDA, arXiv
2406.05223, eq. 3). The paper's adapter `B = U_r √S_r`, `A = √S_r V_rᵀ C⁻¹` needs no inverse and no
right singular vectors: `S Vᵀ C⁻¹ = Uᵀ W`, hence

    A = S_r^-½ U_rᵀ W,    B A = U_r U_rᵀ W,

a projection of `W` onto `r` orthonormal directions of its output space. With `"sqrt_covariance"`
weighting, `C` is replaced by a factor `F` with `F Fᵀ = C`: the left singular vectors of `W F` are
those of `W C^½`, the eigenvectors of the covariance of the layer's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kprune_ext.common.precision import exact_products

from . import subspace_iteration as iterative
from .eigen import energy_of, gram, is_singular, largest_eigenvectors
from .triangular import thin_rows, triangle_of

#: Methods of the paper, which one set of data serves, and which one file of factors may hold together.
METHODS = ("kpm", "ipm")
#: All methods, with those of SC-LoRA and LoRA-Null (`two_sets`).
ALL_METHODS = (*METHODS, "sc_lora", "lora_null")
#: Methods whose directions `U` are of the input space, `(in, rank)`.
OF_INPUTS = ("lora_null",)
WEIGHTINGS = ("covariance", "sqrt_covariance")
# Up to this size the cost of a singular value decomposition is negligible.
_SMALL = 256
# Singular values below this multiple of a product's rounding error may be off by more than 0.1 % in
# energy (on layers of a real model, by 0.09 % at most between this multiple and twice as much).
_BLUR = 3.0


@dataclass(frozen=True, eq=False)
class Directions:
    """Left singular directions of `W F` that one method trains, in order of preference.

    Attributes:
        U: Left singular vectors `(out, rank)`, orthonormal. For any smaller rank `r`, they are the
            first `r` columns.
        S: Their singular values `(rank,)`, descending for `"ipm"`, ascending for `"kpm"`.
        weight_norms: The norms `‖u_iᵀ W‖`, `(rank,)`.
    """

    U: Tensor
    S: Tensor
    weight_norms: Tensor

    @property
    def rank(self) -> int:
        return self.U.shape[1]


def right_factor(covariance: Tensor, weighting: str) -> Tensor:
    """Returns the factor `F (in, in)` of the weight: `C` itself, or an `F` with `F Fᵀ = C` in float64.

    Args:
        covariance: The damped covariance `C (in, in)`.
        weighting: Use `"covariance"` for `F = C`, `"sqrt_covariance"` for an `F` with `F Fᵀ = C`.

    Raises:
        ValueError: If the weighting is unknown.
    """
    if weighting == "covariance":
        return covariance
    covariance = covariance.double()
    if weighting != "sqrt_covariance":
        raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}.")
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return factor
    # Semi-definite, as without damping and with fewer tokens than dimensions.
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def decompose(
    weight: Tensor, factor: Tensor, rank: int, method: str, exact: bool = False
) -> tuple[Directions, float]:
    """Returns left singular vectors and values of `W F`, and its energy.

    For `"ipm"` they are the largest eigenpairs of the Gram matrix `(W F)(W F)ᵀ`. For `"kpm"` that
    matrix would lose the required digits, as it squares the condition number of `W F` (1e8 in
    attention projections of real models). The largest eigenpairs of its inverse, from a triangular
    factor of `W F`, are the same directions to full accuracy. Both are computed in full in float64,
    or, at sizes where that is faster, by subspace iteration, with float32 products where the loss of
    precision is negligible. The energy of the directions is then within 0.1 % (`"ipm"`) and 1 %
    (`"kpm"`) of the optimum, on layers of real models within 0.01 % and 0.5 %.

    Args:
        weight: The weight `W (out, in)`.
        factor: The factor `F (in, in)`, from `right_factor`.
        rank: Number of directions, at most `min(out, in)`.
        method: Use `"ipm"` for the largest singular values, `"kpm"` for the smallest of the thin
            decomposition.
        exact: Whether to use float64 and no iteration at any size.

    Returns:
        The directions, in float32 on the weight's device, and the energy `‖W F‖²` of the layer.

    Raises:
        ValueError: If the rank is out of range or the method is unknown.
    """
    size = min(weight.shape)
    if not 1 <= rank <= size:
        raise ValueError(f"rank must be between 1 and min(out, in) = {size}, got {rank}.")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
    iterate = iterative.is_faster(size, rank, method) and not exact
    with exact_products(weight.device):
        if method == "ipm":
            return _largest_left(weight, factor, rank, iterate)
        return _smallest_left(weight, factor, rank, iterate, exact)


def _largest_left(
    weight: Tensor, factor: Tensor, rank: int, iterate: bool
) -> tuple[Directions, float]:
    if iterate:
        vectors, image, energy = iterative.largest_left(weight, factor, rank)
        return _directions(vectors, image.norm(dim=1), vectors.float().T @ weight.float()), energy
    rows, lift = thin_rows(weight)
    product = rows.double() @ factor.double()
    thin = largest_eigenvectors(gram(product.T), rank)
    values = (thin.T @ product).norm(dim=1)
    return _directions(lift(thin), values, thin.T.float() @ rows.float()), energy_of(product)


def _smallest_left(
    weight: Tensor, factor: Tensor, rank: int, iterate: bool, exact: bool
) -> tuple[Directions, float]:
    rows, lift = thin_rows(weight)
    find = iterative.smallest_right if iterate else _smallest_right
    product, triangle = triangle_of(rows, factor, exact)
    thin, values = find(triangle, rank)
    if _is_blurred(product, values):
        del product, triangle
        product, triangle = triangle_of(rows, factor, exact=True)
        thin, values = find(triangle, rank)
    return _directions(lift(thin), values, thin.T.float() @ rows.float()), energy_of(product)


def _is_blurred(product: Tensor, values: Tensor) -> bool:
    """Whether rounding of a float32 product may be a large part of the norm of `values`."""
    if product.dtype == torch.float64:
        return False
    rounding = torch.finfo(product.dtype).eps * energy_of(product) ** 0.5
    return float(values.norm()) < _BLUR * rounding


def decompose_product(product: Tensor, weight: Tensor, rank: int) -> tuple[Directions, float]:
    """Returns what `decompose` returns for `"ipm"`, given the product `W C` itself.

    Args:
        product: The product `W C (out, in)`, with no more rows than columns.
        weight: The weight `W (out, in)`.
        rank: Number of directions, at most `out`.
    """
    if iterative.is_faster(len(product), rank, "ipm"):
        with exact_products(product.device):
            vectors, image, energy = iterative.largest_left(product, None, rank)
        return _directions(vectors, image.norm(dim=1), vectors.float().T @ weight.float()), energy
    product = product.double()
    vectors = largest_eigenvectors(gram(product.T), rank)
    values = (vectors.T @ product).norm(dim=1)
    return _directions(vectors, values, vectors.T.float() @ weight.float()), energy_of(product)


def _directions(vectors: Tensor, values: Tensor, projected: Tensor) -> Directions:
    """Builds `Directions` from `U`, `S`, and `Uᵀ W` or a matrix with the same row norms."""
    return Directions(
        U=vectors.float(),
        S=values.float(),
        weight_norms=projected.norm(dim=1).float(),
    )


def _smallest_right(triangle: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Right singular vectors `(n, rank)` of `R (n, n)`, and the singular values, smallest first."""
    if not is_singular(triangle):
        # Eigenvectors of Rᵀ R, and so of its inverse.
        inverse = torch.cholesky_inverse(triangle, upper=True)
        values, vectors = torch.linalg.eigh(inverse)
        # Eigenvalues far smaller than the largest are lost in rounding. Small matrices can afford a
        # check of all of them.
        least = values[0] if len(values) <= _SMALL else values[-rank]
        if least > 1e3 * len(values) * torch.finfo(values.dtype).eps * values[-1]:
            return vectors[:, -rank:].flip(1), values[-rank:].flip(0).rsqrt()
    # Singular matrices, such as those of weights with rows of zeros.
    return iterative.smallest_of_all(triangle, rank)
