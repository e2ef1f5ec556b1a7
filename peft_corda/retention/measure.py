"""`forgetting`: how far an adapter moves the outputs of its layers on the calibration data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kprune_ext.files.writing import write_json

from ..decomposition.low_rank import update_product
from ..decomposition.sketch import update_energy
from ..factors import CordaFactors
from .layers import MeasuredLayer, measured_layers

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table


@dataclass(frozen=True)
class ModuleForgetting:
    """Forgetting of one layer, with the update `ΔW` of its weight `W`, over inputs `x` with mean `C`.

    Attributes:
        name: Name of the module in the base model.
        forgetting: `F`, with `F² = tr(ΔW C ΔWᵀ) / tr C`: size of the change of the outputs, relative
            to the inputs.
        relative: `tr(ΔW C ΔWᵀ)^½ / tr(W C Wᵀ)^½`: the same, relative to the layer's own outputs.
    """

    name: str
    forgetting: float
    relative: float


@dataclass(frozen=True, repr=False)
class Forgetting:
    """Result of `forgetting`; rich prints it with a table of all modules.

    Attributes:
        modules: The modules, in the order of the model.
    """

    modules: tuple[ModuleForgetting, ...]

    @property
    def value(self) -> float:
        """`F` of the whole adapter: the root of the mean of `F²` over its modules."""
        return _root_mean_square([module.forgetting for module in self.modules])

    @property
    def relative(self) -> float:
        """As `value`, relative to the outputs of the layers themselves."""
        return _root_mean_square([module.relative for module in self.modules])

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return (
            f"Forgetting({self.value:.4g}, relative={self.relative:.4g}, "
            f"modules={len(self.modules)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers as JSON-ready values."""
        rows = [dataclasses.asdict(module) for module in self.modules]
        return {"forgetting": self.value, "relative": self.relative, "modules": rows}

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON; the file appears only when it is complete."""
        write_json(path, self.to_dict())

    def table(self) -> Table:
        """Returns a table with a row per module, for `rich.print`."""
        from rich.table import Table

        table = Table(title="Change of the outputs on the calibration data")
        table.add_column("module")
        table.add_column("‖ΔW x‖ / ‖x‖", justify="right")
        table.add_column("‖ΔW x‖ / ‖W x‖", justify="right")
        for module in self.modules:
            table.add_row(module.name, f"{module.forgetting:.3g}", f"{module.relative:.3g}")
        table.add_section()
        table.add_row("all", f"{self.value:.3g}", f"{self.relative:.3g}")
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield self.table()


def forgetting(
    model: nn.Module, factors: CordaFactors | str, adapter_name: str | None = None
) -> Forgetting:
    """Estimate what an adapter makes a model forget of the calibration data, without running it.

    The size of an adapter's update on the inputs of data that it should leave alone predicts how much
    worse the model becomes on that data. It is computed from the adapter and the sketches of the inputs
    that calibration keeps, in about the time of a training step's adapter products on 64 tokens.

    Args:
        model: A model with a CORDA adapter or a plain LoRA, trained or in training. The adapter may be
            merged or disabled; it is left as it is.
        factors: Factors of a calibration on the data that is not to be forgotten, with sketches
            (`CordaConfig(corda_sketch=...)`), or the path of their file. For a plain LoRA, calibrate
            with a `CordaConfig` of the same `target_modules`; its method and rank do not matter.
        adapter_name: Name of the adapter; the active one if None.

    Returns:
        The forgetting of each layer, and of all together.

    Raises:
        TypeError: If the model has no such adapter, or it is neither LoRA nor CORDA.
        ValueError: If the adapter is not `B A` beside an unchanged base (DoRA, PiSSA and others), or the
            factors lack a sketch for one of its layers.
    """
    return measured(measured_layers(model, factors, adapter_name))


@torch.no_grad()
def measured(layers: Sequence[MeasuredLayer]) -> Forgetting:
    """The forgetting of layers that were looked up before."""
    energies = [
        update_energy(own.sketch, update_product(*own.parts(), scale=own.scale)).double().cpu()
        for own in layers
    ]
    return Forgetting(
        tuple(
            ModuleForgetting(
                own.name,
                _root_of(float(energy), own.input_energy),
                _root_of(float(energy), own.output_energy),
            )
            for own, energy in zip(layers, energies, strict=True)
        )
    )


def _root_of(energy: float, whole: float) -> float:
    # A layer without inputs or outputs other than zero changes nothing.
    return (energy / whole) ** 0.5 if whole > 0 else 0.0


def _root_mean_square(values: Sequence[float]) -> float:
    return (sum(value**2 for value in values) / len(values)) ** 0.5
