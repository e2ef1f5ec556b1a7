"""Pairs of texts to score embedders on, and sentences without labels to prune and to distil on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kprune_ext.evaluation.metrics import spearman
from kprune_ext.evaluation.predictions import cosines, embeddings_of

from ..common.corpora import read_rows
from ..common.stopwatch import Stopwatch

Embed = Callable[[Iterable[dict[str, Tensor]]], Tensor]
LENGTH = 128
_BATCH = 32


@dataclass(frozen=True)
class PairSet:
    """A set of pairs, of which some are more alike than others.

    Attributes:
        split: Split to score on.
        fields: Names of the two texts.
        label: Name of the number that says how alike they are.
        sign: -1 where a greater number means less alike.
    """

    split: str
    fields: tuple[str, str]
    label: str
    sign: int = 1


PAIR_SETS = {
    "stsb": PairSet("test", ("sentence1", "sentence2"), "score"),
    "mrpc": PairSet("test", ("sentence1", "sentence2"), "label"),
    "qnli": PairSet("validation", ("question", "sentence"), "label", -1),  # 0 is "answers it"
}
#: Data sets whose training sentences are calibrated on.
SENTENCES = ("stsb", "mrpc")


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts by number, with how alike they are.

    Attributes:
        texts: Different texts, the shortest first.
        first, second: Numbers of the texts of each pair, `(pairs,)`.
        alike: How alike they are, `(pairs,)`.
    """

    texts: Sequence[str]
    first: Tensor
    second: Tensor
    alike: Tensor


def read_pairs(data: Path, name: str, most: int | None) -> Pairs:
    """The pairs of a data set, `most` of them from all over it, or all."""
    about = PAIR_SETS[name]
    rows = list(read_rows(data / name / f"{about.split}.jsonl"))
    if most is not None and most < len(rows):
        rows = [rows[number * len(rows) // most] for number in range(most)]
    texts = sorted(dict.fromkeys(row[field] for row in rows for field in about.fields), key=len)
    place = {text: number for number, text in enumerate(texts)}
    first, second = (torch.tensor([place[row[field]] for row in rows]) for field in about.fields)
    alike = torch.tensor([about.sign * float(row[about.label]) for row in rows])
    return Pairs(texts, first, second, alike)


def read_sentences(data: Path) -> list[str]:
    """The different sentences of the training sets, without their labels."""
    found = []
    for name in SENTENCES:
        for row in read_rows(data / name / "train.jsonl"):
            found += [row[field] for field in PAIR_SETS[name].fields]
    return list(dict.fromkeys(found))


def batches_of(
    texts: Sequence[str], tokenizer: Any, size: int = _BATCH
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of texts, in their order."""
    for start in range(0, len(texts), size):
        part = list(texts[start : start + size])
        cut = {"truncation": True, "max_length": min(LENGTH, tokenizer.model_max_length)}
        yield dict(tokenizer(part, padding=True, return_tensors="pt", **cut))


def shuffled(texts: Sequence[str], seed: int) -> list[str]:
    """The texts in an order that the seed determines."""
    return random.Random(seed).sample(list(texts), len(texts))


def scores(
    model: Any, dense: Any, tokenizer: Any, data: Path, most: Mapping[str, int | None]
) -> dict[str, float]:
    """The scores of an embedder, and how near it is to the dense one.

    Args:
        model: The embedder, whose embeddings are the means of its last hidden states.
        dense: The dense one, which may be the model itself.
        tokenizer: The tokenizer of both.
        data: Folder of the data sets.
        most: Largest number of pairs by data set; None for all.

    Returns:
        Spearman's correlation for each set in percent; the mean cosine to the dense model's embeddings
        of STS-B's texts, and the lowest hundredth of these cosines; and the seconds that it took.
    """
    own, other = (partial(embeddings_of, one) for one in (model, dense))
    return scores_of(own, None if model is dense else other, tokenizer, data, most)


def scores_of(
    own: Embed, dense: Embed | None, tokenizer: Any, data: Path, most: Mapping[str, int | None]
) -> dict[str, float]:
    """`scores` of any program that embeds batches; `dense` is None where it is the dense model's."""
    watch = Stopwatch()
    found: dict[str, float] = {}
    for name in PAIR_SETS:
        pairs = read_pairs(data, name, most[name])
        vectors = own(batches_of(pairs.texts, tokenizer))
        likeness = cosines(vectors[pairs.first], vectors[pairs.second])
        found[name] = 100 * spearman(likeness, pairs.alike)
        if name == "stsb" and dense is not None:
            near = cosines(vectors, dense(batches_of(pairs.texts, tokenizer)))
            found["cosine"], found["cosine_low"] = float(near.mean()), float(near.quantile(0.01))
    return found | {"cpu_seconds": watch.read()["cpu"]}
