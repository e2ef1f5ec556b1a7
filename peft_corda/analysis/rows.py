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
        name: of the module.
        type: what it has in common with modules of other layers: ``q_proj``.
        shape: `(out, in)` of its weight.
        rank: of the adapter.
        parameters: trainable ones, `rank · (out + in)`.
        energy_share: `Σ S_r² / ‖W F‖²`, between 0 and 1: what part of the layer's response to the
            calibration data lies in the adapter's directions. For ``ipm`` it is captured, and should
            be large; for ``kpm`` it is exposed to training (leaks), and should be small.
        effective_rank: over how many directions the layer's inputs are spread; None where the
            calibration did not collect what tells it.
        tokens: calibration tokens that the layer saw.
        norm_ratio: `‖A‖ / ‖B‖` (Frobenius) of the start: 1 if the scaling is ``"balanced"``.
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
    """Modules of one type. `worst_energy_share` is the smallest for ``ipm``, the largest for ``kpm``."""

    type: str
    modules: int
    parameters: int
    median_energy_share: float
    worst_energy_share: float
