"""Calibration data: single samples without padding, from a user's batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..common.data.token_ids import require_known_tokens
from ..common.text_data import LABEL_KEYS
from ..model_layers.inputs import Inputs
from ..model_layers.layer_stack import arguments_of
from .batches import (
    Batch,
    ImageTokens,
    check_inputs,
    entries_of,
    entries_with_rows,
    image_batch,
    is_empty,
    padding_can_go,
    split,
    text_batch,
    with_targets,
)
from .labels import labels_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One sequence without the padding after it; for causal models, without that before it, too.

    Attributes:
        inputs: The model's arguments, or all entries that `predict` may read. Its rows are
            `(1, tokens, …)`, or `(1, …)` where they do not run along the sequence.
        tokens: Bool mask, True at unmasked tokens, `(1, tokens)`.
        keyed: Names of the rows that the sample's key depends on, all tensors; None for all rows.
        targets: For language models, the labels `(1, tokens)`: each position's own token, or -100 where
            its prediction does not count.
        labels: Labels of other tasks, `(1, …)`, by which the result is judged; None if the data have
            none.
    """

    inputs: Inputs
    tokens: Tensor
    keyed: frozenset[str] | None = None
    targets: Tensor | None = None
    labels: Tensor | None = None

    def first(self, most: int) -> Sample:
        """Returns the first tokens of a text, which a causal model treats as it does in the whole."""
        width = self.tokens.shape[1]
        rows = {
            name: value[:, :most]
            if isinstance(value, Tensor) and value.shape[1:2] == (width,)
            else value
            for name, value in self.inputs.rows.items()
        }
        targets = None if self.targets is None else self.targets[:, :most]
        return Sample(Inputs(rows, self.inputs.whole), self.tokens[:, :most], self.keyed, targets)

    @property
    def count(self) -> int:
        """Number of unmasked tokens."""
        return int(self.tokens.sum())


@dataclass(frozen=True)
class CalibrationData:
    """One process's samples, with totals over all processes.

    Attributes:
        samples: Samples of this process.
        keys: Key of each of these samples, from `sample_keys`.
        largest_scored: Largest key of the samples on which knowledge is measured.
        count: Number of samples of all processes.
        tokens: Number of unmasked tokens of all processes.
        held_out: Samples of this process that are used for nothing but judging the result.
    """

    samples: Sequence[Sample]
    keys: Sequence[int]
    largest_scored: int
    count: int
    tokens: int
    held_out: Sequence[Sample] = ()


def collect_samples(
    model: PreTrainedModel,
    dataloader: Iterable[Any],
    max_tokens: int,
    image_tokens: ImageTokens | None = None,
    needed: bool = True,
    runs: Callable[[Inputs], Any] | None = None,
    *,
    causal: bool = False,
    targets: bool = False,
) -> list[Sample]:
    """Takes samples from the dataloader, in its order, up to `max_tokens` unmasked tokens.

    Padding at the end of a sequence is removed, and batches without samples and samples without any
    unmasked token are left out. Labels and arguments that the model's forward does not accept are
    ignored, unless the user's `predict` may read them. Entries that do not have one value for each
    sample are handed on whole with every sample. In a batch without an `attention_mask` every token
    counts, as in the model itself.

    Args:
        model: The model, which determines the arguments that are taken and whether they are text or
            images.
        dataloader: Batches as mappings from argument names to tensors.
        max_tokens: Largest number of unmasked tokens in total; the first sample is always taken.
        image_tokens: For images, returns the number of tokens that the model has per image of a batch.
        needed: Whether data without any unmasked token are an error.
        runs: Runs the user's `predict` on one sample, to find out whether it takes all entries of a
            batch; None if the model is called with the batch.
        causal: Whether padding before a sequence is removed, too, as no token depends on it.
        targets: Whether samples have the labels of a causal language model.

    Raises:
        TypeError: If a batch is not a mapping of tensors.
        ValueError: If a batch lacks `input_ids` or `pixel_values`, has ids that the model does not
            know or an `attention_mask` whose shape is not `(batch, tokens)`, or if needed data hold no
            unmasked token.
    """
    accepted = arguments_of(model) - LABEL_KEYS
    images = model.main_input_name == "pixel_values" and image_tokens is not None
    first: Mapping[str, Any] | None = None
    left_out: frozenset[str] | None = None
    found: list[tuple[Batch, list[int]]] = []
    total = seen = 0
    for batch in dataloader:
        seen += 1
        if is_empty(batch):
            continue
        entries = entries_of(batch, accepted, every=runs is not None)
        check_inputs(entries, batch, images=images)
        require_known_tokens(model, entries.get("input_ids"))
        if left_out is None and runs is not None:
            left_out = unread_entries(entries, accepted, runs)
        entries = {n: value for n, value in entries.items() if n not in (left_out or ())}
        first = batch if first is None else first
        shared = frozenset(n for n in entries if n in first and batch[n] is first[n])
        if images and image_tokens is not None:
            whole = image_batch(entries, shared, image_tokens)
        else:
            whole = text_batch(entries, shared)
        if targets:
            whole = with_targets(whole, batch)
        else:
            whole = replace(whole, labels=labels_in(batch, whole.rows))
        rows, total, full = _rows_within(whole, total, max_tokens)
        found.append((whole, rows))
        if full:
            break
    samples = _cut(found, accepted, causal)
    if needed:
        _require_samples(samples, seen)
    return samples


def _rows_within(batch: Batch, total: int, most: int) -> tuple[list[int], int, bool]:
    """Returns the rows with tokens up to a limit, the tokens with them, and whether it is reached."""
    rows: list[int] = []
    for row, count in enumerate(batch.tokens.sum(1).tolist()):
        if count == 0:
            continue
        if total and total + count > most:
            return rows, total, True
        rows.append(row)
        total += count
    return rows, total, False


def _cut(
    found: Sequence[tuple[Batch, list[int]]], accepted: set[str], causal: bool
) -> list[Sample]:
    """Cuts batches into the samples of the chosen rows."""
    samples = []
    every_own = entries_with_rows([batch for batch, _ in found])
    for (batch, rows), own in zip(found, every_own, strict=True):
        inputs, width = split(batch.entries, own), batch.tokens.shape[1]
        positions = torch.arange(1, width + 1, device=batch.tokens.device)
        lengths = (batch.tokens * positions).amax(1).tolist()
        firsts = batch.tokens.long().argmax(1).tolist() if causal else [0] * batch.rows
        keyed = frozenset(n for n in own & accepted if isinstance(batch.entries[n], Tensor))
        cuts = not batch.images and padding_can_go(batch, own)
        for row in rows:
            part = slice(firsts[row], lengths[row]) if cuts else slice(width)
            cut = {
                name: value[:, part]
                if cuts and isinstance(value, Tensor) and value.shape[1:2] == (width,)
                else value
                for name, value in inputs.part(slice(row, row + 1)).rows.items()
            }
            tokens = batch.tokens[row : row + 1, part]
            wanted = None if batch.targets is None else batch.targets[row : row + 1, part]
            labels = None if batch.labels is None else batch.labels[row : row + 1]
            if labels is not None and labels.shape[1:2] == (width,):
                labels = labels[:, part]
            samples.append(Sample(Inputs(cut, inputs.whole), tokens, keyed, wanted, labels))
    return samples


def unread_entries(
    entries: Mapping[str, Any], accepted: set[str], runs: Callable[[Inputs], Any]
) -> frozenset[str]:
    """Returns the entries of a batch that are left out because the user's `predict` fails with them.

    Such as labels out of range, or columns that it would pass to a model that does not know them.

    Args:
        entries: The entries of a batch.
        accepted: Arguments of the model's forward other than labels.
        runs: Runs the user's `predict` on the batch.

    Raises:
        Exception: That of `predict`, if it fails whatever is left out.
    """
    names = frozenset(entries)
    failure: Exception | None = None
    for left_out in dict.fromkeys((frozenset[str](), names & LABEL_KEYS, names - accepted)):
        kept = {name: value for name, value in entries.items() if name not in left_out}
        try:
            runs(split(kept, set()))
        except Exception as error:
            failure = failure or error
            continue
        if failure is not None:
            logger.warning(
                "predict fails on a calibration batch with all of its entries (%s: %s). %s are left "
                "out of every batch.",
                type(failure).__name__,
                failure,
                ", ".join(sorted(left_out)),
            )
        return left_out
    assert failure is not None
    raise failure


def _require_samples(samples: Sequence[Sample], batches: int) -> None:
    if batches == 0:
        raise ValueError(
            "The calibration data are empty: the dataloader yielded no batch. Pass a dataloader over "
            "a few hundred inputs (an iterator that is already exhausted yields none)."
        )
    if not samples:
        raise ValueError(
            f"The calibration data hold no unmasked token: attention_mask is 0 everywhere, or there "
            f"is no input, in {batches} batches. Check the collator: 1 marks tokens, 0 marks padding."
        )


def require_finite(values: Tensor, name: str) -> None:
    """Refuses NaN and infinite values.

    Args:
        values: The values to check.
        name: Where they arise, for the message.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"NaN or infinite values at {name} on the calibration data. Check the model's weights "
            "and inputs; if the model is in float16, load it in float32 or bfloat16."
        )
