"""Divergence of predictions from a teacher's, and the factor on logits that reduces it.

Logits are `(positions, classes)`. The effect of pruning on a model's activations is noise to its last
layer, and noise makes logits larger than the evidence warrants, as training does (Guo et al. 2017,
arXiv 1706.04599). Their remedy, one factor for all logits, is applied here with the dense model's
predictions in place of labels. A positive factor does not change the ranking of the classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..architectures.tasks import ProblemType

#: Range of the factor.
BOUNDS = (0.125, 8.0)
_HALVINGS = 40


def divergence(logits: Tensor, teacher: Tensor, problem: ProblemType) -> Tensor:
    """Kullback-Leibler divergence of predictions from a teacher's, KL(teacher ‖ own).

    Args:
        logits, teacher: Logits, `(positions, classes)`.
        problem: Meaning of the logits: a softmax over the classes, or a Bernoulli variable per class,
            whose divergences are summed.

    Returns:
        Divergence per position, `(positions,)`, in nats.

    Raises:
        ValueError: If the logits are regression outputs, not classes.
    """
    if problem == "regression":
        raise ValueError("Regression has no classes whose probabilities could diverge.")
    if problem == "multi_label_classification":
        p, q = teacher.sigmoid(), (-teacher).sigmoid()
        on = p * (logsigmoid(teacher) - logsigmoid(logits))
        return (on + q * (logsigmoid(-teacher) - logsigmoid(-logits))).sum(1)
    wanted = teacher.log_softmax(1)
    return (wanted.exp() * (wanted - logits.log_softmax(1))).sum(1)


def best_scale(pairs: Sequence[tuple[Tensor, Tensor]], problem: ProblemType) -> float:
    """Factor s in `BOUNDS` that minimises  mean KL(teacher ‖ s · own) + (s − 1)² / 2n.

    The second term, for n positions, keeps the factor close to 1 where predictions are few. The slope
    grows with s, so bisection finds its zero.

    Args:
        pairs: Own and teacher's logits, `(positions, classes)` each, of any numbers of classes.
            Classes whose teacher's probability is zero at any scale, such as masked tokens, must be
            left out or have the same logit of at most -1e30 in both.
        problem: Meaning of the logits, as for `divergence`.

    Returns:
        The factor; 1.0 if `pairs` hold no predictions.
    """
    count = sum(len(own) for own, _ in pairs)
    if not count:
        return 1.0
    low, high = BOUNDS
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        slope = sum(_slope(own, teacher, middle, problem) for own, teacher in pairs) + middle - 1
        low, high = (low, middle) if slope > 0 else (middle, high)
    return (low * high) ** 0.5


def _slope(own: Tensor, teacher: Tensor, scale: float, problem: ProblemType) -> float:
    """Derivative of the divergence by the scale: Σ_c z_c (q_c − p_c), summed over positions."""
    usable = own > -1e30  # masked entries are not classes
    z = torch.where(usable, own, 0).double()
    scaled = torch.where(usable, scale * z, own.double())
    if problem == "multi_label_classification":
        q, p = scaled.sigmoid(), teacher.double().sigmoid()
    else:
        q, p = scaled.softmax(1), teacher.double().softmax(1)
    return float((z * (q - p)).sum())
