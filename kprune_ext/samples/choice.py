"""The choice of samples for what: by their content, the same in any order and any process."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from ..model_layers.inputs import content, fingerprint
from .samples import Sample

# Least number of samples of which one is held out.
_ENOUGH = 10


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


def least_held_out(keys: Sequence[int], fraction: float) -> int:
    """Returns the least key of the samples that are held out, above all keys if none is.

    They are those of the largest keys, at least one of ten or more, and never the majority.

    Args:
        keys: Keys of all samples.
        fraction: Fraction of the samples to hold out.
    """
    count = round(fraction * len(keys))
    if fraction > 0 and len(keys) >= _ENOUGH:
        count = max(count, 1)
    count = min(count, len(keys) // 2)
    ordered = sorted(keys)
    return ordered[-count] if count else (ordered[-1] if ordered else -1) + 1
