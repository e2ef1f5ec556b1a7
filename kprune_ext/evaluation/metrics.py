"""Scores of predictions: accuracy, F1 and Spearman's rank correlation, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(predicted: Tensor, wanted: Tensor) -> float:
    """Returns the fraction of predictions that are right.

    Args:
        predicted: Predicted classes, `(samples,)`.
        wanted: Labels, `(samples,)`.

    Raises:
        ValueError: If there are no samples, or not as many predictions as labels.
    """
    _check(predicted, wanted)
    return float((predicted == wanted).double().mean())


def binary_f1(predicted: Tensor, wanted: Tensor, positive: int = 1) -> float:
    """Returns F1 of one class: the harmonic mean of its precision and its recall.

    It is 0 where the class is neither predicted nor wanted.

    Args:
        predicted: Predicted classes, `(samples,)`.
        wanted: Labels, `(samples,)`.
        positive: The class.

    Raises:
        ValueError: As `accuracy`.
    """
    _check(predicted, wanted)
    found, true = predicted == positive, wanted == positive
    both = int((found & true).sum())
    either = int(found.sum()) + int(true.sum())
    return 2 * both / either if either else 0.0


def macro_f1(predicted: Tensor, wanted: Tensor) -> float:
    """Returns the mean of F1 over the classes that are predicted or wanted, each counted alike.

    Args:
        predicted: Predicted classes, `(samples,)`.
        wanted: Labels, `(samples,)`.

    Raises:
        ValueError: As `accuracy`.
    """
    _check(predicted, wanted)
    classes = torch.cat([predicted, wanted]).unique().tolist()
    return sum(binary_f1(predicted, wanted, one) for one in classes) / len(classes)


def average_ranks(values: Tensor) -> Tensor:
    """Returns the ranks of numbers from 1 up; equal numbers share the mean of their ranks.

    Args:
        values: The numbers, `(samples,)`.

    Returns:
        `(samples,)` in float64.
    """
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def spearman(predicted: Tensor, wanted: Tensor) -> float:
    """Returns Spearman's rank correlation, from -1 to 1, with average ranks for ties.

    It is 0 where all predictions or all labels are equal, which have no order.

    Args:
        predicted: Predicted numbers, `(samples,)`.
        wanted: Labels, `(samples,)`.

    Raises:
        ValueError: As `accuracy`.
    """
    _check(predicted, wanted)
    ranks = torch.stack([average_ranks(predicted.double()), average_ranks(wanted.double())])
    apart = ranks - ranks.mean(1, keepdim=True)
    norms = apart.norm(dim=1).prod()
    return float(apart.prod(0).sum() / norms) if norms else 0.0


def _check(predicted: Tensor, wanted: Tensor) -> None:
    if predicted.shape != wanted.shape or predicted.ndim != 1 or not len(predicted):
        raise ValueError(
            f"There are predictions of shape {tuple(predicted.shape)} for labels of shape "
            f"{tuple(wanted.shape)}. Pass one prediction and one label of each sample."
        )
