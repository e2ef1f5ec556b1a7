"""Two processes, each with its own share of the data, find what one finds with all of it."""

import pytest
import torch

from peft_corda import CordaFactors, calibrate
from peft_corda.base_model.targets import find_targets
from tests.distributed import two_processes
from tests.helpers.corda import covariances_of, deep_model, make_config
from tests.helpers.launching import launched


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of the two processes saw."""
    return launched(two_processes, tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone():
    factors = calibrate(deep_model("llama", 3), make_config(), two_processes.BATCHES, verbose=False)
    return factors


def loaded(data, tmp_path):
    (tmp_path / "factors").write_bytes(data)
    return CordaFactors.load(tmp_path / "factors")


@pytest.mark.parametrize("case", ["sums of uneven shares", "sums with an empty share"])
def test_sums_are_those_of_one_process(case, seen):
    model = deep_model("llama", 3)
    targets = find_targets(model, make_config())
    expected = covariances_of(model, targets, two_processes.BATCHES)
    for one in seen:
        for name, (matrix, tokens) in one[case].items():
            assert tokens == expected[name].tokens
            error = (matrix - expected[name].matrix).norm() / expected[name].matrix.norm()
            assert error <= 1e-6, name


@pytest.mark.parametrize(
    "case", ["uneven shares", "several passes", "empty share", "empty share, several passes"]
)
def test_factors_are_those_of_one_process(case, seen, alone, tmp_path):
    assert isinstance(seen[0][case], bytes), seen[0][case]
    assert seen[0][case] == seen[1][case]
    found = loaded(seen[0][case], tmp_path)
    assert found.tokens == alone.tokens
    for name, module in alone.modules.items():
        ours, theirs = (of.directions["kpm"].U.double() for of in (found.modules[name], module))
        overlap = torch.linalg.svdvals(ours.T @ theirs)
        assert overlap.min() > 1 - 1e-4, name  # one space, both orthonormal


def test_passes_change_nothing(seen):
    assert seen[0]["several passes"] == seen[0]["uneven shares"]


@pytest.mark.parametrize(
    ("case", "failed", "error"),
    [
        ("error in an iterator", 1, "OSError: the disk is gone"),
        ("error in a pass", 1, "OSError: the disk is gone"),
        ("not a mapping", 0, "TypeError: Calibration batch 1 is a list; expected a mapping"),
    ],
)
def test_error_in_one_process_ends_both(case, failed, error, seen):
    assert seen[failed][case].startswith(error)
    other = seen[1 - failed][case]
    assert other.startswith(f"RuntimeError: Process {failed} failed, and this process")
    assert f"The error there was: {error}" in other


def test_no_data_anywhere(seen):
    for one in seen:
        assert one["no data at all"].startswith("ValueError: The calibration data is empty")


def test_going_on_after_an_error(seen):
    assert seen[1]["cut off"].startswith("OSError")
    assert seen[0]["files"] == ["plan.json", "sums-0.safetensors", "sums-1.safetensors"]
    for one in seen:
        assert one["gone on"] == seen[0]["uneven shares"]


def test_checkpoint_of_other_data_is_refused_by_both(seen):
    for one in seen:
        assert "another calibration: first batch of the data differ" in one["other data"]
