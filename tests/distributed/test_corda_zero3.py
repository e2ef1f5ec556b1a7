"""Calibration and training under DeepSpeed's ZeRO-3, in two processes; needs deepspeed."""

import pytest
import torch
from peft import get_peft_model

from peft_corda import CordaFactors, calibrate
from tests.helpers.corda import deep_model, logits_of, make_config
from tests.helpers.launching import launched

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero3")


@pytest.fixture(scope="module")
def seen(folder):
    from tests.distributed import zero3_processes

    return launched(zero3_processes, folder)


@pytest.fixture(scope="module")
def alone():
    """One process on the same data: its factors, and the losses of the same steps."""
    from tests.distributed import zero3_processes as script

    factors = calibrate(deep_model("llama", 3), make_config(), script.BATCHES, verbose=False)
    model = get_peft_model(deep_model("llama", 3), make_config(corda_factors=factors)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=script.RATE, weight_decay=0.0)
    losses = []
    for _ in range(script.STEPS):
        loss = model(**script.TEXT, labels=script.TEXT["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return factors, losses


def test_factors_are_those_of_one_process(seen, alone, folder):
    found = CordaFactors.load(folder / "factors.safetensors")
    for name, factors in alone[0].modules.items():
        ours, theirs = (f.directions["kpm"].U.double() for f in (factors, found.modules[name]))
        # The same subspace: all of one lies in the other.
        torch.testing.assert_close(
            theirs.T @ ours @ ours.T @ theirs, torch.eye(ours.shape[1]).double(), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("case", ["", "partitioned "])
def test_training_is_that_of_one_process(seen, alone, case):
    from tests.distributed import zero3_processes as script

    base = logits_of(deep_model("llama", 3), script.TEXT)
    for process in seen:
        torch.testing.assert_close(process[f"{case}start"], base, rtol=0, atol=1e-6)
        assert process[f"{case}losses"] == pytest.approx(alone[1], rel=1e-4)


def test_saved_adapter_loads_on_a_plain_model(seen):
    torch.testing.assert_close(seen[0]["reloaded"], seen[0]["logits"], rtol=0, atol=1e-5)
