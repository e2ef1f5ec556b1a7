"""Weight tuning: the ridge regression that fits a pruned projection to its target.

Shapes: features are `(tokens, units)`, targets `(tokens, outputs)`, weights `(outputs, units)` as
in `nn.Linear`. (arXiv 2308.03449, section 4.4; the ridge and the bias are additions to the paper.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.precision import exact_products, full_product, multiplies_narrow

# Smallest ridge relative to the mean square activation: the first keeps float64 sums positive
# definite when units are copies of one another, the second covers the rounding of products, whose
# error has a norm of up to 2.2 ε √units (40 to 2000 tokens per batch, 64 to 1536 units).
_FLOOR = 1e-10
_ROUNDING = 4.0
_TRIES = 6
#: Ridges to choose from, in the unit of `tune_projection`.
RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
# Squared errors up to this multiple of the least count as equal.
_NEARLY_BEST = 1.01
# Ridge if there are no held-out samples to choose it by.
_USUAL_RIDGE = 3.0


@dataclass
class NormalEquations:
    """Sums over tokens, in float64, that determine a linear least-squares fit.

    Attributes:
        gram: Gram matrix, the sum of f fᵀ, `(units, units)`.
        cross: Sum of f yᵀ, `(units, outputs)`.
        feature_sum: Sum of f, `(units,)`.
        target_sum: Sum of y, `(outputs,)`.
        target_square: Sum of the squared norms of y.
        tokens: Sum of the weights of the tokens.
        epsilon: Machine precision of the products that were summed.
    """

    gram: Tensor
    cross: Tensor
    feature_sum: Tensor
    target_sum: Tensor
    target_square: float = 0.0
    tokens: float = 0.0
    epsilon: float = torch.finfo(torch.float64).eps

    @classmethod
    def zeros(cls, units: int, outputs: int, device: torch.device | str = "cpu") -> NormalEquations:
        """Returns equations without any token."""

        def empty(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(empty(units, units), empty(units, outputs), empty(units), empty(outputs))

    def update(self, features: Tensor, targets: Tensor, weight: float = 1.0) -> None:
        """Adds tokens to the sums.

        Products are taken in the precision of the input (at least float32), sums in float64.

        Args:
            features: Inputs of the projection, `(tokens, units)`.
            targets: Their targets, `(tokens, outputs)`.
            weight: Weight of each token.
        """
        narrow = features.dtype == targets.dtype and multiplies_narrow(features)
        if features.dtype in (torch.float16, torch.bfloat16) and not narrow:
            features, targets = features.float(), targets.float()
        with exact_products(features.device):
            self.gram.add_(full_product(features, features).double(), alpha=weight)
            self.cross.add_(full_product(features, targets).double(), alpha=weight)
        self.feature_sum.add_(features.sum(0, dtype=torch.float64), alpha=weight)
        self.target_sum.add_(targets.sum(0, dtype=torch.float64), alpha=weight)
        self.target_square += weight * float(targets.square().sum(dtype=torch.float64))
        self.tokens += weight * len(features)
        precision = torch.promote_types(features.dtype, torch.float32)
        self.epsilon = max(self.epsilon, torch.finfo(precision).eps)

    def plus(self, other: NormalEquations) -> NormalEquations:
        """Returns the equations of both sets of tokens; this object's memory is reused."""
        return NormalEquations(
            self.gram.add_(other.gram),
            self.cross.add_(other.cross),
            self.feature_sum.add_(other.feature_sum),
            self.target_sum.add_(other.target_sum),
            self.target_square + other.target_square,
            self.tokens + other.tokens,
            max(self.epsilon, other.epsilon),
        )

    def squared_error(self, weight: Tensor, bias: Tensor) -> float:
        """Sum over the tokens of ‖W f + b − y‖², for any weight `(outputs, units)` and bias."""
        mapped = weight @ self.gram - 2 * self.cross.T
        constant = 2 * (weight @ self.feature_sum - self.target_sum) + self.tokens * bias
        return self.target_square + float((mapped * weight).sum()) + float(bias @ constant)


@dataclass(frozen=True)
class TunedProjection:
    """A fitted projection.

    Attributes:
        weight: The weight, `(outputs, units)` in float64.
        bias: The bias, `(outputs,)` in float64.
        error: Relative error: square root of (squared residuals / squared deviations of the target
            from its mean). 0 is a perfect fit; 1 is no better than a bias, and more is possible if
            the bias is fixed.
    """

    weight: Tensor
    bias: Tensor
    error: float


def tune_projection(
    equations: NormalEquations, weight: Tensor, ridge: float, bias: Tensor | None = None
) -> TunedProjection:
    """Fits weight and bias to the targets, with a ridge towards the given weight.

    Minimises  sum ‖W f + b − y‖² + r ‖W − W₀‖²  over W and b, where
    r = ridge · (units / tokens) · trace(sum f fᵀ) / units, so that the fit stays closer to the
    original weights the fewer tokens there are per unit. The bias is free or fixed. The equations are
    solved by Cholesky factorisation, after centring if the bias is free.

    Args:
        equations: The sums over the calibration tokens.
        weight: The original weights W₀ of the units kept, `(outputs, units)`.
        ridge: Strength of the ridge; 0 adds only what the rounding of the sums requires.
        bias: Fixed bias, `(outputs,)`; None fits the bias too.

    Returns:
        The fitted projection.

    Raises:
        ValueError: If no token was summed, or the shapes disagree.
        torch.linalg.LinAlgError: If the equations are not finite.
    """
    units, outputs = equations.cross.shape
    if equations.tokens == 0:
        raise ValueError("The equations have no token to fit to. Pass calibration data.")
    if weight.shape != (outputs, units):
        raise ValueError(
            f"The weight has shape {tuple(weight.shape)}, but the equations are for "
            f"{(outputs, units)} (outputs, units)."
        )
    centred = _Centred.of(equations, weight, bias)
    tuned, fitted = centred.solved(ridge)
    gram, cross, offset = centred.gram, centred.cross, centred.offset
    target_mean = equations.target_sum / equations.tokens

    variation = equations.target_square - float(target_mean @ equations.target_sum)
    # Squared distance of the targets from the bias alone, before the features explain any of it.
    distance = equations.target_square + float(
        equations.tokens * offset @ offset - 2 * offset @ equations.target_sum
    )
    missed = distance - 2 * float((tuned.T * cross).sum()) + float(((tuned @ gram) * tuned).sum())
    error = (max(missed, 0.0) / variation) ** 0.5 if variation > 0 else 0.0
    return TunedProjection(tuned, fitted, error)


@dataclass(frozen=True)
class _Centred:
    """Normal equations for the change of the weights, which serve any ridge.

    Attributes:
        equations: The sums over the tokens.
        original: The original weights W₀, `(outputs, units)` in float64.
        bias: Fixed bias, or None.
        gram, cross: The sums, centred if the bias is free.
        offset: Bias that is subtracted from the targets, `(outputs,)`.
        wanted: Right-hand sides of the change, `(units, outputs)`.
    """

    equations: NormalEquations
    original: Tensor
    bias: Tensor | None
    gram: Tensor
    cross: Tensor
    offset: Tensor
    wanted: Tensor

    @classmethod
    def of(cls, equations: NormalEquations, weight: Tensor, bias: Tensor | None) -> _Centred:
        original = weight.double()
        feature_mean = equations.feature_sum / equations.tokens
        target_mean = equations.target_sum / equations.tokens
        offset = target_mean if bias is None else bias.double()
        gram = equations.gram
        if bias is None:
            gram = gram - torch.outer(equations.feature_sum, feature_mean)
        cross = equations.cross - torch.outer(equations.feature_sum, offset)
        wanted = cross - gram @ original.T
        return cls(equations, original, bias, gram, cross, offset, wanted)

    def solved(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Returns the weight and bias for a ridge."""
        equations, tuned = self.equations, self.original
        units = len(self.gram)
        if units:
            mean_square = equations.gram.diagonal().mean()
            least = max(_FLOOR, _ROUNDING * equations.epsilon * units**0.5)
            strength = mean_square * max(ridge * units / equations.tokens, least)
            # If all units are dead, any positive strength leaves the weights as they were.
            strength = torch.where(strength > 0, strength, torch.ones_like(strength))
            factor = _cholesky(self.gram, strength)
            tuned = self.original + torch.cholesky_solve(self.wanted, factor).T
        if self.bias is not None:
            return tuned, self.bias.double()
        feature_mean = equations.feature_sum / equations.tokens
        return tuned, equations.target_sum / equations.tokens - tuned @ feature_mean


def _cholesky(gram: Tensor, strength: Tensor) -> Tensor:
    """Cholesky factor of gram + strength · identity; strength is raised until that is definite.

    Devices may multiply less precisely than their number format suggests (TensorFloat-32).
    """
    for _ in range(_TRIES):
        shifted = gram.clone()
        shifted.diagonal().add_(strength)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return factor
        strength = 10 * strength
    raise torch.linalg.LinAlgError(
        "Weight tuning has no solution: the sums over the calibration tokens are not finite, or too "
        "imprecise. Check the model for infinite, NaN or huge activations."
    )


def choose_ridge(
    halves: tuple[NormalEquations, NormalEquations], weight: Tensor, bias: Tensor | None = None
) -> float:
    """Returns the ridge of `RIDGES` with the least held-out error of a two-fold cross-validation.

    Each half is fitted and evaluated on the other. Among ridges that are nearly as good the strongest is
    taken, as the error itself is an estimate.

    Args:
        halves: The equations of two sets of tokens, preferably of different samples.
        weight: The original weights W₀, as for `tune_projection`.
        bias: Fixed bias; None fits the bias too.
    """
    if not (halves[0].tokens and halves[1].tokens and weight.shape[1]):
        return _USUAL_RIDGE
    errors = dict.fromkeys(RIDGES, 0.0)
    for fitted, other in (halves, halves[::-1]):
        centred = _Centred.of(fitted, weight, bias)
        for ridge in RIDGES:
            errors[ridge] += other.squared_error(*centred.solved(ridge))
    # If all fit perfectly, the differences are rounding errors, and errors may be below zero.
    rounding = 1e-12 * (halves[0].target_square + halves[1].target_square)
    enough = _NEARLY_BEST * max(min(errors.values()), 0.0) + rounding
    return max(ridge for ridge, error in errors.items() if error <= enough)
