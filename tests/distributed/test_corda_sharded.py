"""FSDP2 in two processes: calibration and training as with the whole model in one place."""

import pytest
import torch

from peft_corda import CordaFactors, calibrate
from tests.distributed import sharded_processes
from tests.distributed.two_processes import BATCHES
from tests.helpers.corda import deep_model, make_config
from tests.helpers.launching import launched


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return launched(sharded_processes, tmp_path_factory.mktemp("sharded"))


def loaded(data, tmp_path):
    assert isinstance(data, bytes), data
    (tmp_path / "factors").write_bytes(data)
    return CordaFactors.load(tmp_path / "factors")


@pytest.mark.parametrize("case", ["uneven shares", "ipm", "several passes", "empty share"])
def test_factors_are_those_of_one_process(case, seen, tmp_path):
    assert seen[0][case] == seen[1][case]
    found, method = loaded(seen[0][case], tmp_path), "ipm" if case == "ipm" else "kpm"
    alone = calibrate(deep_model("llama", 3), make_config(corda_method=method), BATCHES)
    assert found.tokens == alone.tokens
    for name, module in alone.modules.items():
        ours, theirs = found.modules[name], module
        assert ours.energy == pytest.approx(theirs.energy, rel=1e-6), name
        own, expected = (of.directions[method] for of in (ours, theirs))
        torch.testing.assert_close(
            own.S.square().sum(), expected.S.square().sum(), rtol=1e-5, atol=0
        )
        overlap = torch.linalg.svdvals(own.U.double().T @ expected.U.double())
        assert overlap.min() > 1 - 1e-4, name


def test_passes_and_going_on_change_nothing(seen):
    for case in ("several passes", "checkpoint", "gone on"):
        assert seen[0][case] == seen[0]["uneven shares"], case


def test_bad_batch_in_one_process_ends_both(seen):
    assert seen[1]["bad batch"].startswith("TypeError: Calibration batch 1 is a list")
    assert "Process 1 failed" in seen[0]["bad batch"]
    assert "TypeError: Calibration batch 1 is a list" in seen[0]["bad batch"]


@pytest.mark.parametrize("case", ["by hand", "adapters apart", "started late", "accelerate"])
def test_adapter_trains_and_reloads_on_a_plain_model(case, seen):
    for one in seen:
        # Sharded, the base computes what it does: the adapter starts by adding nothing.
        torch.testing.assert_close(one[case]["start"], one[case]["before"])
        assert one[case]["losses"][-1] < one[case]["losses"][0]
        assert (one[case]["sharded"] - one[case]["start"]).abs().max() > 1e-3
        torch.testing.assert_close(one[case]["reloaded"], one[case]["sharded"])
    assert torch.equal(seen[0][case]["reloaded"], seen[1][case]["reloaded"])


def test_all_ways_to_train_give_the_same(seen):
    for case in ("adapters apart", "accelerate"):
        ours, theirs = seen[0][case]["sharded"], seen[0]["by hand"]["sharded"]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
