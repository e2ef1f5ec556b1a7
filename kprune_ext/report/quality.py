"""What a report says about the outputs of a pruned model, and about its speed: plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from .checks import check_number, check_whole, shown

Measure = Literal["classes", "labels", "tokens", "cosine", "correlation"]
_SAID = {
    "classes": "the same class as the original in {share:.1%} of {count:,} predictions",
    "labels": "the same answer as the original for {share:.1%} of {count:,} labels",
    "tokens": "the same next token as the original in {share:.1%} of {count:,} predictions",
    "cosine": "mean cosine similarity to the original's {count:,} outputs: {value:.4f}",
    "correlation": "correlation with the original's {count:,} outputs: {value:.4f}",
}


@dataclasses.dataclass(frozen=True)
class Quality:
    """How near the outputs of a pruned model are to those of the original, and to the labels.

    Attributes:
        measure: What `agreement` is. `"classes"` and `"tokens"`: the share of predictions for which
            both models have the same largest logit. `"labels"`: the share of the labels about which
            both say yes or both say no. `"cosine"`: the mean cosine similarity of outputs such as
            embeddings. `"correlation"`: Pearson's correlation, for outputs of one number.
        agreement: Its value.
        count: Number of predictions that were compared.
        held_out: Whether their samples were held out. If not, they are samples that the weights were
            fitted to, and other samples agree less.
        accuracy, accuracy_before: Share of the labels that the pruned model and the original predict;
            None where the data have no labels.
        labelled: Number of these labels. No label was used for pruning.
    """

    measure: Measure
    agreement: float
    count: int
    held_out: bool
    accuracy: float | None = None
    accuracy_before: float | None = None
    labelled: int = 0

    def lines(self) -> list[str]:
        """Returns it in words, a line per figure."""
        where = "held-out data" if self.held_out else "the calibration data"
        said = _SAID[self.measure].format(
            share=self.agreement, value=self.agreement, count=self.count
        )
        found = [f"on {where}: {said}"]
        if self.accuracy is not None and self.accuracy_before is not None:
            found.append(
                f"accuracy on {self.labelled:,} labels of {where}: {self.accuracy:.1%}, "
                f"before {self.accuracy_before:.1%}"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Speed:
    """Time of a forward pass of one batch, measured for both models in turns.

    Attributes:
        seconds, seconds_before: Median time of the pruned model and of the original.
        batch_size: Number of samples in the batch.
        length: Tokens per sample.
        device: Name of the device, on a CPU with its number of threads.
    """

    seconds: float
    seconds_before: float
    batch_size: int
    length: int
    device: str

    @property
    def factor(self) -> float:
        """How many times as fast the pruned model is."""
        return self.seconds_before / self.seconds

    def line(self) -> str:
        """Returns it in words."""
        return (
            f"a forward pass of {self.batch_size} x {self.length} tokens: "
            f"{1000 * self.seconds:.1f} ms, before {1000 * self.seconds_before:.1f} ms "
            f"({self.factor:.2f} times as fast; {self.device})"
        )


def size_of(count: int) -> str:
    """Returns a number of bytes in megabytes, or in kilobytes if it is small."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def quality_of(stored: Any) -> Quality | None:
    """Returns the value that a report file holds; None for null.

    Raises:
        ValueError, TypeError: If it is not one that a report has.
    """
    if stored is None:
        return None
    found = Quality(**_mapping("quality", stored))
    if found.measure not in get_args(Measure):
        raise ValueError(
            f"measure is {shown(found.measure)}, not one of {', '.join(get_args(Measure))}"
        )
    if not isinstance(found.held_out, bool):
        raise ValueError(f"held_out is {shown(found.held_out)}, but must be true or false")
    check_number("agreement", found.agreement)
    for name in ("accuracy", "accuracy_before"):
        if getattr(found, name) is not None:
            check_number(name, getattr(found, name))
    for name in ("count", "labelled"):
        check_whole(name, getattr(found, name))
    return found


def speed_of(stored: Any) -> Speed | None:
    """Returns the value that a report file holds; None for null.

    Raises:
        ValueError, TypeError: If it is not one that a report has.
    """
    if stored is None:
        return None
    found = Speed(**_mapping("speed", stored))
    for name in ("seconds", "seconds_before"):
        check_number(name, getattr(found, name))
        if not getattr(found, name) > 0:
            raise ValueError(f"{name} is {shown(getattr(found, name))}, but must be positive")
    for name in ("batch_size", "length"):
        check_whole(name, getattr(found, name))
    if not isinstance(found.device, str):
        raise ValueError(f"device is {shown(found.device)}, but must be text")
    return found


def _mapping(name: str, stored: Any) -> Mapping[str, Any]:
    if not isinstance(stored, Mapping):
        raise ValueError(f"{name} is {shown(stored)}, but must be a mapping or null")
    return stored
