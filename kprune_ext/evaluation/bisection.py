"""Bisection of a grid of sizes by scores that go up and down a little."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum


class Verdict(Enum):
    """How good a size is."""

    GOOD = "good enough"
    NEAR = "misses the limit by so little that it may be by chance"
    BAD = "not good enough"


def verdict_of(score: float | None, limit: float, near: float, greater: bool) -> Verdict:
    """Returns the verdict on a score.

    Args:
        score: The score; None if there is no model of that size.
        limit: The score that is wanted.
        near: How far beyond the limit a score is near.
        greater: Whether a greater score is better.
    """
    if score is None:
        return Verdict.BAD
    missing = limit - score if greater else score - limit
    if missing <= 0:
        return Verdict.GOOD
    return Verdict.NEAR if missing < near else Verdict.BAD


def search_step(verdicts: Sequence[Verdict | None]) -> tuple[int | None, int | None]:
    """Returns the largest good size found so far, and the next one to try.

    The sizes are bisected. Beside a near one, the next larger one is tried first, and if that is not
    good either, the next smaller one: the limit is not far.

    Args:
        verdicts: The verdict on each size, from the least removed to the most; None where it has not
            been tried.

    Returns:
        Two places in `verdicts`. The first is None if no size is good, the second if the search is over.
    """
    low, high = -1, len(verdicts)  # the largest that is good, and the smallest that is not
    wanted = None
    while wanted is None and high - low > 1:
        close = high < len(verdicts) and verdicts[high] is Verdict.NEAR
        middle = high - 1 if close else (low + high) // 2
        near = verdicts[middle] is Verdict.NEAR and middle + 1 < high
        decides = middle + 1 if near else middle
        if verdicts[decides] is None:
            wanted = decides
        elif verdicts[decides] is Verdict.GOOD:
            low = decides
        else:
            high = middle
    return (None if low < 0 else low), wanted
