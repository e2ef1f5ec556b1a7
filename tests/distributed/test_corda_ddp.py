"""Training in two processes under `DistributedDataParallel`."""

import pytest
import torch

from peft_corda.base_model.targets import find_targets
from tests.distributed import ddp_processes
from tests.helpers.corda import make_config, make_model
from tests.helpers.launching import launched


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return launched(ddp_processes, tmp_path_factory.mktemp("ddp"))


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("moment", ["start", "whole", "resumed"])
def test_processes_have_the_same_factors(moment, seen):
    assert seen[0][moment]
    assert same(seen[0][moment], seen[1][moment])


def test_only_the_trained_factors_change(seen):
    for name, start in seen[0]["start"].items():
        frozen = ".lora_start_A." in name or ".lora_start_B." in name
        assert torch.equal(start, seen[0]["whole"][name]) == frozen, name


@pytest.mark.skipif(not ddp_processes.RESUMES, reason="transformers 4 does not resume here")
def test_resumed_training_is_the_uninterrupted_one(seen):
    for one in seen:
        assert same(one["resumed"], one["whole"])


def test_checkpoint_reloads_in_one_process(seen):
    for one in seen:
        assert torch.equal(one["reloaded"], one["logits"])


def test_starts_are_not_sent_anew_in_each_step(seen):
    for rank, one in enumerate(seen):
        assert one["starts"] and not one["sent"].intersection(one["starts"])
        assert (one["kept"] == rank).all()


def test_wrapped_model_is_calibrated_under_its_own_names(seen):
    expected = list(find_targets(make_model("llama"), make_config()))
    assert [one["modules of a wrapped model"] for one in seen] == [expected, expected]
