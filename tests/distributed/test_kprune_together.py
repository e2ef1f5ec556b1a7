"""Two processes that prune with an accelerator get what one process gets, both to the bit."""

import pytest
import torch

from kprune_ext import KPruneConfig
from tests.distributed import kprune_two_processes as script
from tests.distributed.kprune_two_processes import BATCHES, HALF, SOME_SCORED
from tests.helpers.kprune_decoders import tiny_decoder
from tests.helpers.launching import launched


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return launched(script, tmp_path_factory.mktemp("pruned"))


def same_to_the_bit(one, other):
    assert one["layers"] == other["layers"]
    assert one["weights"].keys() == other["weights"].keys()
    return all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])


@pytest.mark.parametrize(
    ("case", "config", "tolerance"),
    [
        ("dealt out", HALF, 1e-5),
        ("wrapped", HALF, 1e-5),
        ("uneven", HALF, 1e-5),
        ("empty share", HALF, 1e-5),
        ("some scored", SOME_SCORED, 1e-5),
        # Without a ridge the solution shows more of the rounding in float32 activations.
        ("paper", KPruneConfig.paper(reduction=0.5), 1e-4),
    ],
)
def test_two_processes_prune_as_one(case, config, tolerance, seen):
    one, other = (process[case] for process in seen)
    assert isinstance(one, dict), one
    assert same_to_the_bit(one, other)
    expected = script.pruned(BATCHES, config)
    assert one["layers"] == expected["layers"]
    for name, values in expected["weights"].items():
        missed = torch.linalg.norm((one["weights"][name] - values).float())
        assert missed <= tolerance * torch.linalg.norm(values.float()), name
    assert one["samples"] == expected["samples"] and one["tokens"] == expected["tokens"]


def test_two_processes_prune_a_decoder_as_one(seen):
    one, other = (process["decoder"] for process in seen)
    assert isinstance(one, dict), one
    assert same_to_the_bit(one, other)
    expected = script.pruned(BATCHES, script.THIRD, tiny_decoder("llama"))
    for name in ("layers", "samples", "tokens"):
        assert one[name] == expected[name]
    assert one["perplexity"] == other["perplexity"] == pytest.approx(expected["perplexity"])
    for name, values in expected["weights"].items():
        torch.testing.assert_close(one["weights"][name], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["handed over", "handed over, empty share"])
def test_covariances_are_those_of_the_tokens_of_all_processes(case, seen, tmp_path):
    one, other = (process[case] for process in seen)
    expected = script.handed_over(BATCHES, tmp_path / "sums")
    assert one["factors"] == other["factors"]
    assert one["sums"].keys() == other["sums"].keys() == expected["sums"].keys()
    for name, (total, tokens) in expected["sums"].items():
        assert one["sums"][name][1] == tokens
        torch.testing.assert_close(one["sums"][name][0], total, rtol=1e-3, atol=1e-3)


def test_a_prepared_loader_repeats_what_makes_its_batches_even(seen):
    one, other = (process["prepared"] for process in seen)
    assert same_to_the_bit(one, other)
    assert len(script.SAMPLES) < one["samples"] <= len(script.SAMPLES) + 3


def test_latency_is_measured_in_one_process(seen):
    assert same_to_the_bit(*(process["latency"] for process in seen))


def test_no_process_has_data(seen):
    assert all("None of the 2 processes has calibration data" in p["no data"] for p in seen)


def test_an_error_in_one_process_is_an_error_in_both(seen):
    assert seen[1]["error"] == "OSError: the disk is gone"
    assert "Process 1 failed" in seen[0]["error"] and "the disk is gone" in seen[0]["error"]


def test_without_an_accelerator_each_process_is_by_itself(seen):
    assert same_to_the_bit(seen[0]["alone"], script.pruned(BATCHES))
