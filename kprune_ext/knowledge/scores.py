"""Both kinds of knowledge as one score per unit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..units.sublayers import SubLayer
from .measure import Knowledge


def unit_scores(
    targets: Sequence[SubLayer],
    knowledge: Sequence[Knowledge],
    *,
    lambda_rep: float = 1.0,
    relative: bool = True,
    prior_samples: float = 1.0,
    mu: float | None = None,
) -> list[Tensor]:
    """Computes one score per unit from its knowledge (arXiv 2308.03449, section 4.2).

    The two kinds of knowledge have different units of measurement, and their ratio depends on the
    model's confidence in its predictions. On the relative scale lambda weighs shares of their sums.

    The Fisher information of a model that is confident on most samples comes from the few others, and
    units that these samples do not use get next to none. The prior samples count as if their
    predictive knowledge were distributed like representational knowledge, which is measured on all
    tokens.

    Args:
        targets: The sub-layers.
        knowledge: Knowledge of the units of each sub-layer.
        lambda_rep: Weight of representational relative to predictive knowledge.
        relative: Whether both kinds are scaled to the same sum first.
        prior_samples: Number of prior samples.
        mu: Weight of a head's mean knowledge per dimension; None for its head size.

    Returns:
        Per sub-layer, `(units,)` in float64.
    """
    predictive = sum(float(known.predictive.sum()) for known in knowledge)
    representational = sum(float(known.representational.sum()) for known in knowledge)
    ratio = predictive / representational if predictive and representational else 1.0
    share = lambda_rep * (ratio if relative else 1.0)
    share += prior_samples / max(knowledge[0].samples, 1) * ratio
    scores = []
    for sublayer, known in zip(targets, knowledge, strict=True):
        is_head = sublayer.kind == "attention" and mu is not None
        weight = (mu or 1.0) / sublayer.unit_size if is_head else 1.0
        scores.append(weight * (known.predictive + share * known.representational))
    return scores


def balanced(targets: Sequence[SubLayer], scores: Sequence[Tensor], balance: float) -> list[Tensor]:
    """Scales the scores of each kind of sub-layer towards one mean in all layers.

    Args:
        targets: The sub-layers.
        scores: Scores of the units of each sub-layer, of at least 0.
        balance: Power of the factor that would make the means equal: 0 changes nothing.
    """
    if not balance:
        return list(scores)
    found = []
    for sublayer, own in zip(targets, scores, strict=True):
        alike = [s for t, s in zip(targets, scores, strict=True) if t.kind == sublayer.kind]
        mean = sum(float(s.sum()) for s in alike) / max(sum(len(s) for s in alike), 1)
        of_own = float(own.sum()) / max(len(own), 1)
        found.append(own * (mean / of_own) ** balance if mean > 0 and of_own > 0 else own)
    return found
