"""Calibration data: single samples without padding, from a user's batches."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..common.text_data import LABEL_KEYS
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
)
from .inputs import Inputs, content, fingerprint
from .layer_stack import arguments_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One sequence without the padding after it.

    Attributes:
        inputs: The model's arguments, or all entries that `predict` may read. Its rows are
            `(1, tokens, …)`, or `(1, …)` where they do not run along the sequence.
        tokens: Bool mask, True at unmasked tokens, `(1, tokens)`.
        keyed: Names of the rows that the sample's key depends on, all tensors; None for all rows.
    """

    inputs: Inputs
    tokens: Tensor
    keyed: frozenset[str] | None = None

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
    """

    samples: Sequence[Sample]
    keys: Sequence[int]
    largest_scored: int
    count: int
    tokens: int


def collect_samples(
    model: PreTrainedModel,
    dataloader: Iterable[Any],
    max_tokens: int,
    image_tokens: ImageTokens | None = None,
    needed: bool = True,
    runs: Callable[[Inputs], Any] | None = None,
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

    Raises:
        TypeError: If a batch is not a mapping of tensors.
        ValueError: If a batch lacks `input_ids` or `pixel_values` or has an `attention_mask` whose
            shape is not `(batch, tokens)`, or if needed data hold no unmasked token.
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
        if left_out is None and runs is not None:
            left_out = unread_entries(entries, accepted, runs)
        entries = {n: value for n, value in entries.items() if n not in (left_out or ())}
        first = batch if first is None else first
        shared = frozenset(n for n in entries if n in first and batch[n] is first[n])
        if images and image_tokens is not None:
            whole = image_batch(entries, shared, image_tokens)
        else:
            whole = text_batch(entries, shared)
        rows, total, full = _rows_within(whole, total, max_tokens)
        found.append((whole, rows))
        if full:
            break
    samples = _cut(found, accepted)
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


def _cut(found: Sequence[tuple[Batch, list[int]]], accepted: set[str]) -> list[Sample]:
    """Cuts batches into the samples of the chosen rows."""
    samples = []
    every_own = entries_with_rows([batch for batch, _ in found])
    for (batch, rows), own in zip(found, every_own, strict=True):
        inputs, width = split(batch.entries, own), batch.tokens.shape[1]
        positions = torch.arange(1, width + 1, device=batch.tokens.device)
        lengths = (batch.tokens * positions).amax(1).tolist()
        keyed = frozenset(n for n in own & accepted if isinstance(batch.entries[n], Tensor))
        cuts = not batch.images and padding_can_go(batch, own)
        for row in rows:
            length = lengths[row] if cuts else width
            cut = {
                name: value[:, :length]
                if cuts and isinstance(value, Tensor) and value.shape[1:2] == (width,)
                else value
                for name, value in inputs.part(slice(row, row + 1)).rows.items()
            }
            tokens = batch.tokens[row : row + 1, :length]
            samples.append(Sample(Inputs(cut, inputs.whole), tokens, keyed))
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


def sample_keys(samples: Sequence[Sample], seed: int) -> list[int]:
    """Returns a 63-bit number per sample that depends only on its content and the seed.

    Random draws for a sample are thus the same in any process and any order of samples. Entries that
    only `predict` reads count only where samples do not differ in anything else.
    """
    keys = [_key(sample, seed) for sample in samples]
    alike = {key for key, count in Counter(keys).items() if count > 1}
    full = {n: _key(samples[n], seed, full=True) for n, key in enumerate(keys) if key in alike}
    several: dict[int, set[int]] = defaultdict(set)
    for number, other in full.items():
        several[keys[number]].add(other)
    return [full[n] if len(several.get(key, ())) > 1 else key for n, key in enumerate(keys)]


def _key(sample: Sample, seed: int, *, full: bool = False) -> int:
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8)
    rows = sample.inputs.rows
    keyed = rows.keys() if sample.keyed is None else sample.keyed
    end = int(sample.tokens[0].nonzero().amax()) + 1 if sample.count else 0
    for name in sorted(keyed):
        value = rows[name]
        if name == "attention_mask":  # of any dtype
            value = value.long()
        if value.shape[:2] == sample.tokens.shape:  # masked tokens make no difference
            value = value.clone()
            value[~sample.tokens] = 0
            value = value[:, :end]  # nor does padding that could not be removed
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(content(value))
    if full:
        others = {name: value for name, value in sample.inputs.items() if name not in keyed}
        digest.update(repr(fingerprint(others, objects=False)).encode())
    return int.from_bytes(digest.digest(), "little") >> 1


def largest_scored(keys: Sequence[int], fraction: float, least: int) -> int:
    """Returns the largest key of the samples on which knowledge is measured, -1 without any.

    Keys are pseudo-random, so the samples with keys up to a bound are a random subset.

    Args:
        keys: Keys of all samples.
        fraction: Fraction of the samples to choose.
        least: Smallest number of samples to choose, if there are as many.
    """
    count = max(round(fraction * len(keys)), min(len(keys), least))
    return sorted(keys)[count - 1] if count else -1


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
