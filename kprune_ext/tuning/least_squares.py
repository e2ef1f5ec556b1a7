"""Weight tuning: the least squares that fit a pruned projection to its target.

Shapes: features are ``(tokens, units)``, targets ``(tokens, outputs)``, weights ``(outputs,
units)`` as in ``nn.Linear``. (arXiv 2308.03449, section 4.4; the ridge and the bias are ours.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.precision import exact_products

# The least ridge, relative to the mean square activation: what float64 needs to stay positive
# definite when units are copies of one another, and what rounded products need. Their error has a
# norm of up to 2.2 ε √units (40 to 2000 tokens a batch, 64 to 1536 units).
_FLOOR = 1e-10
_ROUNDING = 4.0
_TRIES = 6
#: Ridges to choose from, in the unit of :func:`tune_projection`.
RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
# Squared errors up to so many times the least count as the same.
_NEARLY_BEST = 1.01
# Where there is nothing to try it on.
_USUAL_RIDGE = 3.0


@dataclass
class NormalEquations:
    """Sums over tokens, in float64, that determine a linear least-squares fit.

    Attributes:
        gram: sum of f fᵀ, ``(units, units)``.
        cross: sum of f yᵀ, ``(units, outputs)``.
        feature_sum: sum of f, ``(units,)``.
        target_sum: sum of y, ``(outputs,)``.
        target_square: sum of the squared norms of y.
        tokens: how many were summed, each as many times as it weighs.
        epsilon: machine precision of the products that were summed.
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
        """Equations in which nothing has been summed yet."""

        def empty(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(empty(units, units), empty(units, outputs), empty(units), empty(outputs))

    def update(self, features: Tensor, targets: Tensor, weight: float = 1.0) -> None:
        """Add tokens: features ``(tokens, units)`` and their targets ``(tokens, outputs)``.

        Each counts ``weight`` times.

        Products are taken in the precision of the input (at least float32), sums in float64.
        """
        if features.dtype in (torch.float16, torch.bfloat16):
            features, targets = features.float(), targets.float()
        with exact_products(features.device):
            self.gram.add_((features.T @ features).double(), alpha=weight)
            self.cross.add_((features.T @ targets).double(), alpha=weight)
        self.feature_sum.add_(features.sum(0, dtype=torch.float64), alpha=weight)
        self.target_sum.add_(targets.sum(0, dtype=torch.float64), alpha=weight)
        self.target_square += weight * float(targets.square().sum(dtype=torch.float64))
        self.tokens += weight * len(features)
        self.epsilon = max(self.epsilon, torch.finfo(features.dtype).eps)

    def plus(self, other: NormalEquations) -> NormalEquations:
        """The equations of both sets of tokens; this object's memory is reused."""
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
        """Sum over the tokens of ‖W f + b − y‖², for any weight ``(outputs, units)`` and bias."""
        mapped = weight @ self.gram - 2 * self.cross.T
        constant = 2 * (weight @ self.feature_sum - self.target_sum) + self.tokens * bias
        return self.target_square + float((mapped * weight).sum()) + float(bias @ constant)


@dataclass(frozen=True)
class TunedProjection:
    """A fitted projection.

    Attributes:
        weight: ``(outputs, units)``, float64.
        bias: ``(outputs,)``, float64.
        error: share of the target's variation about its mean that the fit misses: root of
            (squared residuals / squared deviations). 0 is perfect; 1 is no better than a bias,
            and more is possible where the bias is held.
    """

    weight: Tensor
    bias: Tensor
    error: float


def tune_projection(
    equations: NormalEquations, weight: Tensor, ridge: float, bias: Tensor | None = None
) -> TunedProjection:
    """Fit weight and bias to the targets, with a ridge towards the given weight.

    Minimises  sum ‖W f + b − y‖² + r ‖W − W₀‖²  over W and b, where
    r = ridge · (units / tokens) · trace(sum f fᵀ) / units: the fewer tokens a unit has, the more
    the original weights hold. The bias is free, or held. Solved by Cholesky, after centring if it
    is free.

    Args:
        equations: the sums over the calibration tokens.
        weight: the original weights W₀ of the units kept, ``(outputs, units)``.
        ridge: strength of the pull; 0 leaves only what the rounding of the sums needs.
        bias: ``(outputs,)``, to hold the bias there; None to fit it, too.

    Raises:
        ValueError: no token was summed, or the shapes disagree.
        torch.linalg.LinAlgError: the equations are not finite.
    """
    units, outputs = equations.cross.shape
    if equations.tokens == 0:
        raise ValueError("No token was summed, so there is nothing to fit. Pass calibration data.")
    if weight.shape != (outputs, units):
        raise ValueError(
            f"The weight has shape {tuple(weight.shape)}, but the equations are for "
            f"{(outputs, units)} (outputs, units)."
        )
    original = weight.double()
    feature_mean = equations.feature_sum / equations.tokens
    target_mean = equations.target_sum / equations.tokens
    centre = feature_mean if bias is None else torch.zeros_like(feature_mean)
    offset = target_mean if bias is None else bias.double()
    gram = equations.gram - torch.outer(equations.feature_sum, centre)
    cross = equations.cross - torch.outer(equations.feature_sum, offset)

    if units:
        mean_square = equations.gram.diagonal().mean()
        least = max(_FLOOR, _ROUNDING * equations.epsilon * units**0.5)
        strength = mean_square * max(ridge * units / equations.tokens, least)
        # All units dead: any positive strength leaves the weights as they were.
        strength = torch.where(strength > 0, strength, torch.ones_like(strength))
        factor = _cholesky(gram, strength)
        change = torch.cholesky_solve(cross - gram @ original.T, factor).T
        tuned = original + change
    else:
        tuned = original
    fitted = target_mean - tuned @ feature_mean if bias is None else bias.double()

    variation = equations.target_square - float(target_mean @ equations.target_sum)
    # Squared distance of the targets from the bias alone, before the features explain any of it.
    distance = equations.target_square + float(
        equations.tokens * offset @ offset - 2 * offset @ equations.target_sum
    )
    missed = distance - 2 * float((tuned.T * cross).sum()) + float(((tuned @ gram) * tuned).sum())
    error = (max(missed, 0.0) / variation) ** 0.5 if variation > 0 else 0.0
    return TunedProjection(tuned, fitted, error)


def _cholesky(gram: Tensor, strength: Tensor) -> Tensor:
    """Factor of gram + strength · identity, with more strength where rounding makes that indefinite.

    Devices may multiply less exactly than their numbers are (TensorFloat-32).
    """
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(_TRIES):
        factor, failed = torch.linalg.cholesky_ex(gram + strength * identity)
        if not failed:
            return factor
        strength = 10 * strength
    raise torch.linalg.LinAlgError(
        "The least squares of weight tuning have no solution: sums over the calibration tokens are "
        "not finite, or far too rough. Look for infinite, NaN or huge activations in the model."
    )


def choose_ridge(
    halves: tuple[NormalEquations, NormalEquations], weight: Tensor, bias: Tensor | None = None
) -> float:
    """The one of :data:`RIDGES` with the least error where each half is fitted, and tried on the other.

    Of those that are nearly as good it is the strongest, as the error itself is an estimate.

    Args:
        halves: the equations of two sets of tokens, best of different samples.
        weight: W₀, see :func:`tune_projection`.
        bias: to hold; None to fit it, too.
    """
    if not (halves[0].tokens and halves[1].tokens and weight.shape[1]):
        return _USUAL_RIDGE
    errors = dict.fromkeys(RIDGES, 0.0)
    for ridge in RIDGES:
        for fitted, other in (halves, halves[::-1]):
            fit = tune_projection(fitted, weight, ridge, bias)
            errors[ridge] += other.squared_error(fit.weight, fit.bias)
    # Where all fit perfectly, differences are rounding, and may be below zero.
    rounding = 1e-12 * (halves[0].target_square + halves[1].target_square)
    enough = _NEARLY_BEST * max(min(errors.values()), 0.0) + rounding
    return max(ridge for ridge, error in errors.items() if error <= enough)
