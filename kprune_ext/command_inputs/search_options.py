"""Options of `kprune search` and `kprune sweep`, which compare pruned models by a score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .options import CalibratedOptions

Metric = Literal["accuracy", "f1", "spearman", "perplexity"]


@dataclass(frozen=True, kw_only=True)
class ScoredOptions(CalibratedOptions):
    """What every command that scores models is told besides.

    Args:
        eval: Score that models are compared by: accuracy or F1 of a classifier (of class 1 of two
            classes, else the mean over all), the Spearman correlation of an embedder's cosines or of a
            regression model's outputs with given scores, or the perplexity of a causal language model.
        eval_data: Data to score on, of the same kinds as the calibration data. They should hold none of
            these.
        eval_data_name: Configuration of the data set on the hub that eval_data names.
        eval_split: Split of the data set on the hub that eval_data names.
        eval_field: Field with the text to score on, or two fields for pairs. By default it is
            text_field, and for Spearman of an embedder sentence1 and sentence2 if that is one field.
        label_field: Field with the label or score. By default it is label, labels or score, whichever
            the data have.
        eval_rows: Largest number of rows to score on, the first ones. By default all are used.
        pooling: How an embedder's hidden states become the embedding of a text: by their mean, the first
            token or the last one. The value auto reads it from the model of sentence-transformers, and
            is the mean for others.
    """

    eval: Metric
    eval_data: str
    eval_data_name: str | None = None
    eval_split: str = "train"
    eval_field: list[str] | str | None = None
    label_field: str | None = None
    eval_rows: int | None = None
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ScoredOptions):
    """Prune a model as far as its score allows, by bisection.

    Args:
        keep: Fraction of the model's own score that is to be kept, by default 0.99. Of a perplexity, the
            model's is to be this fraction of the pruned one's.
        tolerance: Largest difference from the model's own score, in its unit, instead of keep. Accuracy,
            F1 and Spearman go up to 1.
        reductions: Fractions to remove that may be tried.
        state_file: File (JSON) of the scores so far. If it exists and is of the same search, what was
            tried is not tried again.
    """

    keep: float | None = None
    tolerance: float | None = None
    reductions: list[float] = field(default_factory=lambda: [n / 10 for n in range(1, 10)])
    state_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class SweepOptions(ScoredOptions):
    """Prune a model to several sizes, and compare their scores and their measured latencies.

    Args:
        output: Folder to write one folder for each fraction to, named by its percent, a table (sweep.md
            and sweep.json) and, if matplotlib is installed, a figure (sweep.png). It must be new, empty,
            or that of the same sweep, which is then resumed.
        reductions: Fractions to remove.
        latency_batch: Number of sequences in the batch on which latency is measured.
    """

    reductions: list[float] = field(default_factory=lambda: [0.3, 0.5, 0.7])
    latency_batch: int = 1
