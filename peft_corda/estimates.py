"""What a calibration is estimated to take, as numbers and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """What one calibration takes on each of `gpus` devices.

    Bytes are of one device, FLOPs of all together.

    Attributes:
        gpus: data-parallel processes, one device each.
        modules: target modules.
        passes: over the data.
        carried: whether passes go on from where the last one ended.
        weights: bytes of the whole model.
        weights_spread: of its share under FSDP2, with the largest block gathered.
        statistics: of the largest pass.
        hidden_states: carried from pass to pass, of this process's share of the data.
        activations: of one batch.
        workspace: of the largest decomposition.
        factors: of all modules.
        peak: above the weights: the larger of running the model and decomposing.
        forward_flops, statistics_flops, decomposition_flops: of all devices together.
        decomposition_share: of the decompositions that the busiest device does.
    """

    gpus: int
    modules: int
    passes: int
    carried: bool
    weights: int
    weights_spread: int
    statistics: int
    hidden_states: int
    activations: int
    workspace: int
    factors: int
    peak: int
    forward_flops: float
    statistics_flops: float
    decomposition_flops: float
    decomposition_share: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        again = "from where the last one ended" if self.carried else "from the start of the model"
        how = f", each {again}" if self.passes > 1 else ""
        rows = [
            ("weights, whole", self.weights),
            (f"weights, spread over {self.gpus} (FSDP2)", self.weights_spread),
            ("statistics", self.statistics),
            ("hidden states", self.hidden_states),
            ("activations", self.activations),
            ("workspace of a decomposition", self.workspace),
            ("factors (CPU)", self.factors),
            ("peak above the weights", self.peak),
        ]
        flops = [
            ("running the model", self.forward_flops),
            ("statistics", self.statistics_flops),
            ("decompositions", self.decomposition_flops),
        ]
        lines = [f"{self.modules} modules, {self.passes} pass{'es' * (self.passes > 1)}{how}"]
        lines += [f"Bytes per device ({self.gpus} in all)"]
        lines += [f"  {name:<34}{size / 1e9:>12,.3f} GB" for name, size in rows]
        lines += ["FLOPs, all devices together"]
        lines += [f"  {name:<34}{count / 1e12:>12,.3f} TFLOPs" for name, count in flops]
        return "\n".join(
            [
                *lines,
                f"  the busiest device does {self.decomposition_share:.0%} of the decompositions",
            ]
        )
