"""The rows of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ModuleReport:
    """One module, at the rank of its adapter.

    Attributes:
        name: Name of the module.
        type: Part of the name that modules of other layers share, such as `q_proj`.
        shape: Shape `(out, in)` of its weight.
        rank: Rank of the adapter.
        parameters: Number of trainable parameters, `rank · (out + in)`.
        energy_share: Share `Σ S_r² / ‖W F‖²` of the layer's response to the calibration data that
            lies in the adapter's directions, between 0 and 1. For `ipm` it is captured and should be
            large; for `kpm` it is exposed to training (leaks) and should be small.
        effective_rank: Effective number of directions of the layer's inputs; None if the calibration
            did not collect the statistics for it.
        tokens: Number of calibration tokens that the layer saw.
        norm_ratio: Ratio `‖A‖ / ‖B‖` (Frobenius) of the start; 1 if the scaling is `"balanced"`.
    """

    name: str
    type: str
    shape: tuple[int, int]
    rank: int
    parameters: int
    energy_share: float
    effective_rank: float | None
    tokens: int
    norm_ratio: float


@dataclass(frozen=True)
class TypeSummary:
    """Summary of the modules of one type.

    `worst_energy_share` is the smallest share for `ipm` and the largest for `kpm`.
    """

    type: str
    modules: int
    parameters: int
    median_energy_share: float
    worst_energy_share: float
