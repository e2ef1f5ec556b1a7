"""How far two models agree, from their logits: pure functions, whose sums add up over batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..architectures.tasks import ProblemType
from .quality import Measure, Quality

#: Label of what does not count.
IGNORED = -100
# Places in the vector of sums.
_COUNT, _AGREE, _LABELS, _RIGHT, _RIGHT_BEFORE, _MISFITS, _X, _Y, _XX, _YY, _XY = range(11)


def no_sums() -> Tensor:
    """Returns the sums over no prediction."""
    return torch.zeros(11, dtype=torch.float64)


def decided(logits: Tensor, problem: ProblemType) -> Tensor:
    """Returns what a model says, in the smallest form that can be compared.

    Args:
        logits: Logits `(batch, positions, classes)`.
        problem: Meaning of the logits.

    Returns:
        On the CPU, the number of the class `(batch, positions)`, a yes or no per label
        `(batch, positions, classes)`, or the outputs themselves in float32.
    """
    if problem == "single_label_classification":
        return logits.argmax(2).cpu()
    if problem == "multi_label_classification":
        return (logits > 0).cpu()
    return logits.float().cpu()


def fitting_labels(labels: Tensor, said: Tensor) -> Tensor | None:
    """Returns labels in the form of `decided`, or None if they are about something else.

    Args:
        labels: Labels of a batch, `(batch, …)`.
        said: Result of `decided` for it.
    """
    if said.is_floating_point() or labels.numel() != said.numel():
        return None
    whole = labels.to(said.device, torch.float64)
    if not bool((whole == whole.round()).all()):
        return None
    return whole.long().reshape(said.shape)


def sums_of(
    before: Tensor,
    after: Tensor,
    counted: Tensor,
    labels: Tensor | None = None,
    classes: int | None = None,
) -> Tensor:
    """Returns the sums that the figures of a batch are made of, float64.

    Args:
        before, after: What the original and the pruned model say, from `decided`.
        counted: Mask of the positions that count, `(batch, positions)`, bool.
        labels: Labels from `fitting_labels`; negative ones do not count.
        classes: Number of classes, beyond which a label shows that the labels are of another task.
    """
    found = no_sums()
    one, other = before[counted], after[counted]
    if one.is_floating_point():
        found[_COUNT] = len(one)
        if one.shape[1] > 1:
            cosine = torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=1)
            found[_AGREE] = cosine.sum()
        else:
            x, y = one.double().flatten(), other.double().flatten()
            for place, values in zip(
                (_X, _Y, _XX, _YY, _XY), (x, y, x * x, y * y, x * y), strict=True
            ):
                found[place] = values.sum()
        return found
    found[_COUNT], found[_AGREE] = one.numel(), (one == other).sum()
    if labels is not None:
        wanted = labels[counted]
        known = wanted >= 0
        found[_LABELS] = known.sum()
        found[_RIGHT] = ((other == wanted) & known).sum()
        found[_RIGHT_BEFORE] = ((one == wanted) & known).sum()
        found[_MISFITS] = (wanted >= (classes or 2)).sum()
    return found


def quality_from(sums: Tensor, measure: Measure, *, held_out: bool) -> Quality | None:
    """Returns the figures from the sums over all batches, or None if nothing was compared.

    Args:
        sums: Sum of the results of `sums_of`.
        measure: What the two models are compared by.
        held_out: Whether the samples were held out.
    """
    total: list[float] = sums.tolist()
    count = round(total[_COUNT])
    agreement = _correlation(total) if measure == "correlation" else total[_AGREE] / max(count, 1)
    if count == 0 or not math.isfinite(agreement):
        return None
    labelled = round(total[_LABELS])
    if labelled == 0 or total[_MISFITS] > 0:
        return Quality(measure, agreement, count, held_out)
    return Quality(
        measure,
        agreement,
        count,
        held_out,
        accuracy=total[_RIGHT] / labelled,
        accuracy_before=total[_RIGHT_BEFORE] / labelled,
        labelled=labelled,
    )


def measure_for(problem: ProblemType, outputs: int) -> Measure:
    """Returns what two models are compared by.

    Args:
        problem: Meaning of the logits.
        outputs: Number of them per prediction.
    """
    if problem == "single_label_classification":
        return "classes"
    if problem == "multi_label_classification":
        return "labels"
    return "cosine" if outputs > 1 else "correlation"


def _correlation(total: list[float]) -> float:
    """Pearson's correlation; not a number where either model always says the same."""
    n = max(total[_COUNT], 1.0)
    spread = total[_XX] - total[_X] ** 2 / n, total[_YY] - total[_Y] ** 2 / n
    if min(spread) <= 1e-12 * max(total[_XX], total[_YY], 1e-300):
        return math.nan
    return (total[_XY] - total[_X] * total[_Y] / n) / math.sqrt(spread[0] * spread[1])
