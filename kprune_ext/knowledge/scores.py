"""Both kinds of knowledge as one score for each unit."""

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
    """Knowledge of every unit as one number (arXiv 2308.03449, section 4.2).

    The two kinds of knowledge have different units, and their ratio depends on how sure the model
    is of its predictions; on the relative scale lambda weighs shares of their sums.

    The Fisher information of a model that is sure of most samples comes from the few that it is not
    sure of, and units that these samples do not use get next to nothing. The prior samples count as if
    their predictive knowledge were distributed like representational knowledge, which is measured on
    all tokens.

    Args:
        targets: Sub-layers.
        knowledge: Of the units of each.
        lambda_rep: Weight of representational against predictive knowledge.
        relative: Whether both kinds are brought to the same sum first.
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
