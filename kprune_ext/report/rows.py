"""One row of a report: the units, cost and error of one sub-layer."""

from __future__ import annotations

import dataclasses

from ..units.kept import decode_indices


@dataclasses.dataclass(frozen=True)
class SubLayerReport:
    """One attention or feed-forward sub-layer.

    Attributes:
        name: Path of the sub-layer's output projection in the model.
        layer: Number of the transformer layer, from 0.
        kind: Kind of the sub-layer: `"attention"` (units are heads or key-value groups) or `"ffn"`
            (units are neurons).
        units, units_before: Number of units after and before pruning.
        flops, flops_before: FLOPs per sequence of the report's length; a multiply-add counts twice.
        parameters, parameters_before: Parameters of its units and the output bias.
        error: Relative reconstruction error: 0 is perfect, 1 is no better than a constant output. None
            if it is unknown, in a report from a saved model's sizes.
        query_heads: Query heads in each key-value group; 1 for heads and neurons.
        kept: Numbers of the units that are kept, as text with runs, such as `"0-2,5"`, counted in the
            model before its first pruning. None where the model's config lists them.
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
    query_heads: int = 1
    kept: str | None = None

    @property
    def unit(self) -> str:
        """Name of the units: heads, key-value groups or neurons."""
        if self.kind == "ffn":
            return "neurons"
        return "heads" if self.query_heads == 1 else "key-value groups"

    @property
    def kept_units(self) -> tuple[int, ...] | None:
        """`kept` as numbers."""
        return None if self.kept is None else decode_indices(self.kept)
