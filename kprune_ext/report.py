"""What a pruning run kept, spent and missed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

_METRIC_NAMES = {
    "flops": "FLOPs",
    "params": "parameters of heads and neurons",
    "latency": "measured latency of the encoder",
}


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
        error: relative reconstruction error: 0 is perfect, 1 no better than a constant output.
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
    error: float


@dataclasses.dataclass(frozen=True)
class KPruneReport:
    """The outcome of a pruning run; ``str()`` is a readable table.

    Attributes:
        sublayers: bottom-up.
        metric: what was counted: ``"flops"``, ``"params"`` or ``"latency"`` (nanoseconds).
        reduction: the fraction of it that was to be removed.
        budget: how much of it the result might have.
        cost, cost_before: how much of it the result and the original have.
        sequence_length: tokens per sequence at which FLOPs are counted.
        samples, tokens: calibration data used.
        parameters, parameters_before: of the whole model, embeddings and head included.
    """

    sublayers: tuple[SubLayerReport, ...]
    metric: str
    reduction: float
    budget: float
    cost: float
    cost_before: float
    sequence_length: int
    samples: int
    tokens: int
    parameters: int
    parameters_before: int

    @property
    def flops(self) -> int:
        """FLOPs of the pruned encoder on one sequence."""
        return sum(sublayer.flops for sublayer in self.sublayers)

    @property
    def flops_before(self) -> int:
        """FLOPs of the encoder before pruning, on one sequence."""
        return sum(sublayer.flops_before for sublayer in self.sublayers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts."""
        return dataclasses.asdict(self) | {
            "flops": self.flops,
            "flops_before": self.flops_before,
            "sublayers": [dataclasses.asdict(sublayer) for sublayer in self.sublayers],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KPruneReport:
        """The inverse of :meth:`to_dict`."""
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        fields["sublayers"] = tuple(SubLayerReport(**row) for row in fields["sublayers"])
        return cls(**fields)

    def __str__(self) -> str:
        lines = [f"{'sub-layer':<16}{'kept':>12}{'MFLOPs':>16}{'parameters':>20}{'error':>8}"]
        for row in self.sublayers:
            unit = "heads" if row.kind == "attention" else "neurons"
            kept = f"{row.units}/{row.units_before}"
            flops = f"{row.flops / 1e6:.2f}/{row.flops_before / 1e6:.2f}"
            parameters = f"{row.parameters:,}/{row.parameters_before:,}"
            label = f"{row.layer} {unit}"
            lines.append(f"{label:<16}{kept:>12}{flops:>16}{parameters:>20}{row.error:>8.3f}")
        share = self.flops / self.flops_before
        lines.append(
            f"encoder: {self.flops / 1e6:.2f} of {self.flops_before / 1e6:.2f} MFLOPs per "
            f"{self.sequence_length}-token sequence kept ({share:.1%})"
        )
        lines.append(
            f"{_METRIC_NAMES[self.metric]}: {self.cost / self.cost_before:.1%} kept, budget "
            f"{self.budget / self.cost_before:.1%}"
        )
        lines.append(f"model: {self.parameters:,} of {self.parameters_before:,} parameters kept")
        lines.append(f"calibrated on {self.tokens:,} tokens in {self.samples:,} samples")
        return "\n".join(lines)
