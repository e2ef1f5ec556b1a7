"""One row of a report: what one sub-layer keeps."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclasses.dataclass(frozen=True)
class SubLayerReport:
    """One attention or feed-forward sub-layer.

    Attributes:
        name: path of the sub-layer's output projection in the model.
        layer: number of the transformer layer, from 0.
        kind: ``"attention"`` (units are heads) or ``"ffn"`` (units are neurons).
        units, units_before: how many units it has, and had.
        flops, flops_before: per sequence of the report's length, multiply-adds times 2.
        parameters, parameters_before: of its units, and the output bias.
        error: relative reconstruction error: 0 is perfect, 1 no better than a constant output; None
            where it is not known, in a report made from a saved model's sizes.
    """

    name: str
    layer: int
    kind: str
    units: int
    units_before: int
    flops: int
    flops_before: int
    parameters: int
    parameters_before: int
    error: float | None
