"""The report of a pruning run, as a table, JSON, Markdown or a figure."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.presentation import html_table, markdown_table
from ..files.writing import write_json
from .checks import MOST_JSON, check_fields, check_rows
from .figure import save_kept
from .quality import Quality, Speed, quality_of, size_of, speed_of
from .rows import SubLayerReport

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

#: File name of the report that the command `kprune prune` writes beside a model.
REPORT_FILE = "kprune_report.json"

_METRIC_NAMES = {
    "flops": "FLOPs",
    "params": "parameters of {units} and neurons",
    "latency": "measured latency of the layers",
    "cache": "bytes of the key-value cache per token",
}


@dataclasses.dataclass(frozen=True)
class KPruneReport:
    """The result of a pruning run: a summary in a REPL, a table when printed and in notebooks.

    Attributes:
        sublayers: The rows of the sub-layers, bottom-up.
        metric: Quantity that the budget limits: `"flops"`, `"params"`, `"latency"` (nanoseconds) or
            `"cache"` (bytes of a key-value cache per token).
        reduction: Fraction of it that was to be removed.
        budget: Largest amount of it that the result was allowed.
        cost, cost_before: Amount of it in the result and in the original.
        sequence_length: Tokens per sequence at which FLOPs are counted.
        samples, tokens: Amount of calibration data used; 0 if unknown.
        parameters, parameters_before: Parameters of the entire model, including embeddings and head.
        logit_scale: Factor on the classifier's weight and bias; None if there was none or it is
            unknown.
        perplexity, perplexity_before: Of a language model's result and original, on samples that were
            held out from calibration; None if there were none.
        held_out_tokens: Number of tokens that these are the perplexities of.
        weight_bytes, weight_bytes_before: Bytes of the weights of the entire model; 0 if unknown.
        quality: Agreement with the original, and accuracy where the data have labels; None if unknown.
        speed: Time of a forward pass of both models; None if it was not measured. Reports that differ
            in nothing else are equal.
        widest: Inputs of the widest output projection, whose weights were fitted to the tokens; 0 if
            unknown.
        original: Hub id of the model that was pruned; None if it has none.
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
    logit_scale: float | None = None
    perplexity: float | None = None
    perplexity_before: float | None = None
    held_out_tokens: int = 0
    weight_bytes: int = 0
    weight_bytes_before: int = 0
    quality: Quality | None = None
    speed: Speed | None = dataclasses.field(default=None, compare=False)
    widest: int = 0
    original: str | None = None

    @property
    def flops(self) -> int:
        """FLOPs of the pruned layers on one sequence."""
        return sum(sublayer.flops for sublayer in self.sublayers)

    @property
    def flops_before(self) -> int:
        """FLOPs of the layers before pruning, on one sequence."""
        return sum(sublayer.flops_before for sublayer in self.sublayers)

    @property
    def attention_units(self) -> str:
        """Name of the units of attention: heads or key-value groups."""
        return next((row.unit for row in self.sublayers if row.kind == "attention"), "heads")

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain numbers, strings, lists and dicts."""
        return dataclasses.asdict(self) | {
            "flops": self.flops,
            "flops_before": self.flops_before,
            "sublayers": [dataclasses.asdict(sublayer) for sublayer in self.sublayers],
        }

    def to_json(self) -> str:
        """Returns `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KPruneReport:
        """Returns the report from a dict that `to_dict` made.

        Raises:
            KeyError, TypeError, ValueError: If a field is missing, or has a value that no report has.
        """
        every = dataclasses.fields(cls)  # those with a default are absent in older reports
        old = {f.name: f.default for f in every if f.default is not dataclasses.MISSING} | values
        fields = {field.name: old[field.name] for field in every}
        check_fields(fields, tuple(_METRIC_NAMES))
        check_rows(fields["sublayers"])
        fields["sublayers"] = tuple(SubLayerReport(**row) for row in fields["sublayers"])
        fields |= {"quality": quality_of(fields["quality"]), "speed": speed_of(fields["speed"])}
        return cls(**fields)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON; the file appears only when it is complete."""
        write_json(path, self.to_dict(), indent=2)

    @classmethod
    def load_json(cls, path: str | os.PathLike[str]) -> KPruneReport:
        """Reads a file that `save_json` wrote.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If the file is not a report.
        """
        try:
            if os.path.getsize(path) > MOST_JSON:
                raise ValueError(f"it has more than {MOST_JSON:,} bytes")
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            said = f"{type(error).__name__}: {str(error)[:200]}"
            raise ValueError(
                f"{os.fspath(path)!r} is not a report of kprune ({said}). "
                f"Pass the {REPORT_FILE} that `kprune prune` or KPruneReport.save_json wrote."
            ) from None

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a figure of the units kept and the reconstruction error of each layer.

        Args:
            path: File to write; its extension sets the format, PNG without one.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If matplotlib does not know the format.
        """
        save_kept(self.sublayers, self.flops / self.flops_before, path)

    def table(self) -> Table:
        """Returns a table with a row per layer, for `rich.print`."""
        from rich.table import Table

        table = Table(title="K-prune: what is kept of each layer")
        for column in (
            "layer",
            self.attention_units,
            "neurons",
            "MFLOPs",
            "parameters",
            "error att.",
            "ffn",
        ):
            table.add_column(column, justify="right")
        for layer in sorted({row.layer for row in self.sublayers}):
            rows = [row for row in self.sublayers if row.layer == layer]
            kinds = {row.kind: row for row in rows}
            flops, before = sum(r.flops for r in rows), sum(r.flops_before for r in rows)
            size, size_before = (
                sum(r.parameters for r in rows),
                sum(r.parameters_before for r in rows),
            )
            table.add_row(
                str(layer),
                *(f"{kinds[k].units} / {kinds[k].units_before}" for k in ("attention", "ffn")),
                f"{flops / 1e6:.2f} / {before / 1e6:.2f}",
                f"{size:,} / {size_before:,}",
                *(_rounded(kinds[k].error) for k in ("attention", "ffn")),
            )
        return table

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Names of columns, and a row of cells per layer."""
        cells = []
        for layer in sorted({row.layer for row in self.sublayers}):
            rows = {row.kind: row for row in self.sublayers if row.layer == layer}
            kept = [f"{rows[k].units} / {rows[k].units_before}" for k in ("attention", "ffn")]
            flops, before, size, size_before = (
                sum(getattr(row, name) for row in rows.values())
                for name in ("flops", "flops_before", "parameters", "parameters_before")
            )
            spent = [f"{flops / 1e6:.2f} / {before / 1e6:.2f}", f"{size:,} / {size_before:,}"]
            cells.append([str(layer), *kept, *spent])
        return ["layer", self.attention_units, "neurons", "MFLOPs", "parameters"], cells

    def markdown(self) -> str:
        """Returns a Markdown table with a row per layer, and the summary below it."""
        below = [f"- {line}" for line in self.summary().splitlines()]
        return "\n".join([markdown_table(*self._cells()), "", *below])

    def _repr_html_(self) -> str:
        return html_table(*self._cells(), self.summary())

    def __repr__(self) -> str:
        return (
            f"KPruneReport of {len(self.sublayers)} sub-layers; print it for all\n{self.summary()}"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield self.table()
        yield self.summary()

    def summary(self) -> str:
        """Returns the parts of the entire model that are kept, in a few lines."""
        share = self.flops / self.flops_before
        metric = _METRIC_NAMES[self.metric].format(units=self.attention_units)
        lines = [
            f"layers: {self.flops / 1e6:.2f} of {self.flops_before / 1e6:.2f} MFLOPs per "
            f"{self.sequence_length}-token sequence kept ({share:.1%})",
            f"{metric}: {self.cost / self.cost_before:.1%} kept, budget "
            f"{self.budget / self.cost_before:.1%}",
            f"model: {self.parameters:,} of {self.parameters_before:,} parameters kept"
            + self._size(),
        ]
        if self.samples:
            few = (
                f", fewer than the {self.widest:,} inputs of a fitted layer: expect less on other data"
                if self.tokens < self.widest
                else ""
            )
            lines.append(f"calibrated on {self.tokens:,} tokens in {self.samples:,} samples{few}")
        if self.logit_scale is not None:
            lines.append(
                f"logits times {self.logit_scale:.3f}, nearest to the original's probabilities"
            )
        return "\n".join([*lines, *self.figures()])

    def _size(self) -> str:
        if not self.weight_bytes_before:
            return ""
        return f" ({size_of(self.weight_bytes)} of {size_of(self.weight_bytes_before)})"

    def figures(self) -> list[str]:
        """Returns how good the model is, in words: perplexity, agreement, accuracy and speed."""
        lines = []
        if self.perplexity is not None and self.perplexity_before is not None:
            lines.append(
                f"perplexity on {self.held_out_tokens:,} held-out tokens: {self.perplexity:.2f}, "
                f"before {self.perplexity_before:.2f}"
            )
        lines += [] if self.quality is None else self.quality.lines()
        return lines if self.speed is None else [*lines, self.speed.line()]

    def __str__(self) -> str:
        lines = [f"{'sub-layer':<16}{'kept':>12}{'MFLOPs':>16}{'parameters':>20}{'error':>8}"]
        for row in self.sublayers:
            unit = row.unit.removeprefix("key-value ")
            kept = f"{row.units}/{row.units_before}"
            flops = f"{row.flops / 1e6:.2f}/{row.flops_before / 1e6:.2f}"
            parameters = f"{row.parameters:,}/{row.parameters_before:,}"
            label = f"{row.layer} {unit}"
            lines.append(
                f"{label:<16}{kept:>12}{flops:>16}{parameters:>20}{_rounded(row.error):>8}"
            )
        return "\n".join([*lines, self.summary()])


def _rounded(error: float | None) -> str:
    return "–" if error is None else f"{error:.3f}"
