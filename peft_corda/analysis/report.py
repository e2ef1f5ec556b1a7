"""`report`: factors of a calibration and the start of its adapters, as a table or JSON."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kprune_ext.files.presentation import html_table, markdown_table
from kprune_ext.files.writing import write_json

from ..config import SCALINGS, CordaConfig, rank_of
from ..decomposition.starting_factors import norm_ratio
from ..factors import CordaFactors
from .figure import save_spectra
from .rows import ModuleReport, TypeSummary
from .spectra import energy_shares, module_types, pick_method, rank_cost

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

# Methods whose directions should have much of the energy; those of the others should have little.
_CAPTURING = ("ipm", "sc_lora")

_COLUMNS = ("module", "out × in", "rank", "energy share", "input rank", "tokens", "‖A‖/‖B‖")

# Most lines that a report takes in a REPL.
_MOST_LINES = 18


@dataclass(frozen=True)
class CordaReport:
    """Result of `report`: a summary as text, with a table of all modules in rich and in notebooks.

    Attributes:
        method: The method.
        scaling: The scaling, `"balanced"` or `"paper"`, on which `norm_ratio` depends.
        weighting: Weighting of the calibration.
        damping: Damping of the calibration.
        modules: Rows of the report, in the order of the factors.
        spectra: Shares `S_i² / ‖W F‖²` of all directions that the factors hold, `(rank,)`, by module
            name.
    """

    method: str
    scaling: str
    weighting: str
    damping: float
    modules: tuple[ModuleReport, ...]
    spectra: Mapping[str, Tensor] = field(repr=False, compare=False)

    @property
    def parameters(self) -> int:
        """Number of trainable parameters of all adapters."""
        return sum(module.parameters for module in self.modules)

    @property
    def tokens(self) -> int:
        """Number of calibration tokens, the smallest over the modules."""
        return min(module.tokens for module in self.modules)

    @property
    def types(self) -> tuple[TypeSummary, ...]:
        """Summaries by type of module, in the order in which the types first occur."""
        worst = min if self.method in _CAPTURING else max
        found: dict[str, list[ModuleReport]] = {}
        for module in self.modules:
            found.setdefault(module.type, []).append(module)
        return tuple(
            TypeSummary(
                type=name,
                modules=len(members),
                parameters=sum(member.parameters for member in members),
                median_energy_share=statistics.median(m.energy_share for m in members),
                worst_energy_share=worst(m.energy_share for m in members),
            )
            for name, members in found.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers except the spectra, as JSON-ready values."""
        return {
            "method": self.method,
            "scaling": self.scaling,
            "weighting": self.weighting,
            "damping": self.damping,
            "parameters": self.parameters,
            "tokens": self.tokens,
            "types": [dataclasses.asdict(summary) for summary in self.types],
            "modules": [
                dataclasses.asdict(module) | {"shape": list(module.shape)}
                for module in self.modules
            ],
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON; the file appears only when it is complete."""
        write_json(path, self.to_dict())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Save a figure of the spectra, with a panel per type of module and a line per layer.

        Args:
            path: File to write. Its ending determines the format, which is PNG without one.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If matplotlib does not know the format.
        """
        save_spectra(self.method, self.modules, self.spectra, path)

    def table(self) -> Table:
        """Returns a table with a row per module, for `rich.print`."""
        from rich.table import Table

        table = Table(title=f"CorDA {self.method}: {_meaning(self.method)}")
        table.add_column(_COLUMNS[0])
        for column in _COLUMNS[1:]:
            table.add_column(column, justify="right")
        for row in self._cells():
            table.add_row(*row)
        return table

    def _cells(self) -> list[list[str]]:
        """A row of cells per module."""
        return [
            [
                module.name,
                f"{module.shape[0]} × {module.shape[1]}",
                str(module.rank),
                _percent(module.energy_share),
                "—" if module.effective_rank is None else f"{module.effective_rank:.1f}",
                f"{module.tokens:,}",
                f"{module.norm_ratio:.3g}",
            ]
            for module in self.modules
        ]

    def markdown(self) -> str:
        """Returns a Markdown table with a row per module, and the summary below it."""
        first, *types = str(self).splitlines()
        return "\n".join(
            [
                markdown_table(_COLUMNS, self._cells()),
                "",
                first,
                "",
                *(f"- {line.strip()}" for line in types),
            ]
        )

    def _repr_html_(self) -> str:
        return html_table(_COLUMNS, self._cells(), str(self))

    def __repr__(self) -> str:
        lines = str(self).splitlines()
        more = [f"  and {len(lines) - _MOST_LINES} more types"] if len(lines) > _MOST_LINES else []
        return "\n".join(lines[:_MOST_LINES] + more)

    def __str__(self) -> str:
        worst = "least" if self.method in _CAPTURING else "most"
        lines = [
            f"CorDA {self.method}, {len(self.modules)} modules, {self.parameters:,} trainable "
            f"parameters, {self.tokens:,} tokens. Energy share: {_meaning(self.method)}."
        ]
        few = [module for module in self.modules if module.tokens < module.shape[1]]
        if few:
            widest = max(module.shape[1] for module in few)
            lines.append(
                f"  Too few tokens for {len(few)} of the modules, which have up to {widest:,} inputs: "
                "their energy shares look better than they are. Calibrate on at least "
                f"{10 * widest:,} tokens."
            )
        for kind in self.types:
            lines.append(
                f"  {kind.type}: {kind.modules} modules, {kind.parameters:,} parameters, energy share "
                f"median {_percent(kind.median_energy_share)}, {worst} "
                f"{_percent(kind.worst_energy_share)}"
            )
        return "\n".join(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield self.table()
        yield str(self)


def report(
    factors: CordaFactors,
    config: CordaConfig | None = None,
    method: str | None = None,
    *,
    scaling: str | None = None,
) -> CordaReport:
    """Describe the result of a calibration. Needs neither the model nor the data.

    Args:
        factors: Result of `calibrate` or of `CordaFactors.load(path)`.
        config: Config whose ranks (`r`, `rank_pattern`), method and scaling are used. Without one the
            ranks are those of the factors and the scaling is `"balanced"`.
        method: `"kpm"` or `"ipm"`, in place of the config's method; needed only without a config and
            if the factors hold both.
        scaling: `"balanced"` or `"paper"`, in place of the config's scaling.

    Returns:
        The report.

    Raises:
        ValueError: If the scaling is unknown, or if the factors do not hold the method or weighting
            or have too small a rank.
    """
    method = pick_method(factors, method, config)
    scaling = scaling or (config.corda_scaling if config is not None else SCALINGS[0])
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {SCALINGS}, got {scaling!r}.")
    ranks = {name: factors.rank(name, method) for name in factors.modules}
    if config is not None:
        ranks = {name: rank_of(config, name) for name in factors.modules}
        factors.check_fits(method, config.corda_weighting, ranks, weights={})
    types = module_types(factors.modules)
    spectra = {name: energy_shares(own, method) for name, own in factors.modules.items()}
    rows = []
    for name, own in factors.modules.items():
        rank = ranks[name]
        rows.append(
            ModuleReport(
                name=name,
                type=types[name],
                shape=(own.shape[0], own.shape[1]),
                rank=rank,
                parameters=rank * rank_cost(own.shape),
                energy_share=float(spectra[name][:rank].sum()),
                effective_rank=own.effective_rank,
                tokens=own.tokens,
                norm_ratio=norm_ratio(own.directions[method], rank, scaling),
            )
        )
    return CordaReport(method, scaling, factors.weighting, factors.damping, tuple(rows), spectra)


def _meaning(method: str) -> str:
    if method in _CAPTURING:
        return "captured by the adapter, the more the better"
    return "exposed to training, the less the better"


def _percent(share: float) -> str:
    # Leaked shares are often tiny.
    return f"{share:.1%}" if share >= 0.001 or share == 0 else f"{100 * share:.1e}%"
