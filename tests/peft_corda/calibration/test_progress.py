"""One progress bar over all passes, as it is seen on a terminal."""

from __future__ import annotations

import re

import pytest

from peft_corda import CordaConfig, calibrate
from peft_corda.calibration import progress
from peft_corda.calibration.progress import Progress
from tests.helpers.corda import make_batches, make_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def bars_in(shown: str) -> set[str]:
    """Descriptions of the bars on a terminal: text before a percentage or a count."""
    lines = [part.strip() for part in re.split(r"[\r\n]", shown) if "left]" in part or "%|" in part]
    return {re.split(r"\s+\d", line)[0] for line in lines}


@pytest.fixture
def calibrated(capfd):
    def run(batches, **options):
        config = CordaConfig(target_modules=TARGETS, r=4)
        calibrate(make_model("llama"), config, batches, **options)
        return capfd.readouterr().err

    return run


def test_several_passes_show_one_bar_with_the_time_left(calibrated) -> None:
    shown = calibrated(make_batches(3), max_memory=60_000)
    passes = int(re.findall(r"pass \d+ of (\d+)", shown)[0])
    assert passes > 1
    # One line of the terminal, written over and over: no bar is left behind when a pass ends.
    # (A bar that is slow to be drawn shows its last state again when it is closed.)
    assert shown.rstrip("\n").count("\n") == shown[: shown.index("pass 1 of")].count("\n")
    assert "100%" in shown and "left]" in shown
    steps = re.findall(r"(\d+)/(\d+) \[", shown)
    assert {total for _, total in steps} == {steps[-1][1]} and steps[-1][0] == steps[-1][1]
    assert len(re.findall(r"\n(?=Calibrating)", shown)) <= 1
    numbers = [int(number) for number in re.findall(r"pass (\d+) of", shown)]
    assert numbers == sorted(numbers) and numbers[-1] == passes


def test_an_iterator_shows_a_count_until_its_length_is_known(calibrated) -> None:
    shown = calibrated(iter(make_batches(3)))
    assert "100%" in shown and "Decomposing" not in shown


def test_no_bar_without_progress(calibrated) -> None:
    assert calibrated(make_batches(3), progress=False) == ""


def test_the_time_left_is_that_of_batches_and_decompositions(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Progress(4, [2, 3])
    assert bar.left() == (0.0, False)
    for number, _ in enumerate(bar.over(range(4))):
        now[0] += 10.0
        if number == 2:
            assert bar.left() == (6 * 10.0, False)  # decompositions are not timed yet
    bar.start_decomposing()
    for _ in range(2):
        now[0] += 1.0
        bar.decomposed()
    assert bar.left() == (4 * 10.0 + 3 * 1.0, True)
    bar.skip(1)
    assert bar.left() == (0.0, True)
    bar.close()
