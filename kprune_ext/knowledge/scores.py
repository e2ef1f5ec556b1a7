"""Both kinds of knowledge as one score for each unit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..config import KPruneConfig
from ..units.sublayers import SubLayer
from .measure import Knowledge


def unit_scores(
    targets: Sequence[SubLayer], knowledge: Sequence[Knowledge], config: KPruneConfig
) -> list[Tensor]:
    """Knowledge of every unit as one number; a head's is mu times its mean over dimensions.

    The two kinds of knowledge have different units, and their ratio depends on how sure the model
    is of its predictions; on the relative scale lambda weighs shares of their sums.

    The Fisher information of a model that is sure of most samples comes from the few that it is not
    sure of, and units that these do not use get next to nothing. ``prior_samples`` count as spread
    like representational knowledge, which all tokens are measured for.
    """
    predictive = sum(float(known.predictive.sum()) for known in knowledge)
    representational = sum(float(known.representational.sum()) for known in knowledge)
    ratio = predictive / representational if predictive and representational else 1.0
    share = config.lambda_rep * (ratio if config.lambda_scale == "relative" else 1.0)
    share += config.prior_samples / max(knowledge[0].samples, 1) * ratio
    scores = []
    for sublayer, known in zip(targets, knowledge, strict=True):
        is_head = sublayer.kind == "attention" and config.mu is not None
        weight = (config.mu or 1.0) / sublayer.unit_size if is_head else 1.0
        scores.append(weight * (known.predictive + share * known.representational))
    return scores
