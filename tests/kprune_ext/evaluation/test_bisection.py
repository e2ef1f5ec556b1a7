"""Bisection by scores that go up and down."""

from __future__ import annotations

import itertools

import pytest

from kprune_ext.evaluation.bisection import Verdict, search_step, verdict_of

GOOD, NEAR, BAD = Verdict


def searched(truth: tuple[Verdict, ...]) -> tuple[int | None, list[int]]:
    """The place that is found, and the places tried in their order."""
    seen: list[Verdict | None] = [None] * len(truth)
    tried: list[int] = []
    best, place = search_step(seen)
    while place is not None:
        assert seen[place] is None
        seen[place] = truth[place]
        tried.append(place)
        best, place = search_step(seen)
    return best, tried


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
def test_scores_that_fall_are_bisected(size) -> None:
    for good in range(size + 1):
        best, tried = searched((GOOD,) * good + (BAD,) * (size - good))
        assert best == (good - 1 if good else None)
        assert len(tried) <= size.bit_length()


def test_whatever_the_scores_a_good_size_is_found_and_none_is_tried_twice() -> None:
    for truth in itertools.product((GOOD, NEAR, BAD), repeat=6):
        best, tried = searched(truth)
        assert len(set(tried)) == len(tried)
        if best is None:
            assert all(truth[place] is not GOOD for place in tried)
        else:
            assert truth[best] is GOOD
            assert all(truth[place] is not GOOD for place in tried if place > best)


def test_what_follows_a_near_miss_decides() -> None:
    assert searched((GOOD, GOOD, GOOD, NEAR, NEAR, GOOD, BAD, BAD, BAD)) == (5, [4, 5, 7, 6])
    assert searched((GOOD, GOOD, GOOD, GOOD, NEAR, BAD, BAD, BAD, BAD)) == (3, [4, 5, 3])
    assert searched((GOOD, GOOD, GOOD, NEAR, NEAR, BAD, BAD, BAD, BAD)) == (2, [4, 5, 3, 2])
    assert searched((GOOD, GOOD, GOOD, NEAR, BAD, GOOD, BAD, BAD, BAD)) == (2, [4, 1, 2, 3])
    assert searched((NEAR,)) == (None, [0])


@pytest.mark.parametrize(
    ("score", "greater", "verdict"),
    [
        (0.9, True, GOOD),
        (0.87, True, GOOD),
        (0.869, True, NEAR),
        (0.86, True, BAD),
        (0.86, False, GOOD),
        (0.874, False, NEAR),
        (0.88, False, BAD),
        (None, True, BAD),
        (None, False, BAD),
    ],
)
def test_verdicts(score, greater, verdict) -> None:
    assert verdict_of(score, 0.87, 0.005, greater) is verdict


def test_without_room_nothing_is_near() -> None:
    assert verdict_of(0.86, 0.87, 0.0, True) is BAD
