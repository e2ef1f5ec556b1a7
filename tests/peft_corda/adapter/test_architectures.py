"""Many families of models: an adapter of rank 2 on all linear layers, one step, saved and loaded."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_corda import CordaConfig, calibrate
from tests.helpers.architectures import ROWS, batch_of, build, output_of

# Layers that a forward pass with these inputs does not call.
NEVER_CALLED = {
    "LEDForConditionalGeneration": r".*_global",
    "SiglipVisionModel": r".*head\.attention\.out_proj",
    "WavLMForSequenceClassification": r".*(q|k|v|out)_proj",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_train_save_load(name, tmp_path):
    # PyTorch multiplies inputs that are not contiguous by other kernels if the weight is frozen.
    model, batch = build(name).requires_grad_(False), batch_of(name)
    torch.manual_seed(2)  # masks that some models draw
    with torch.no_grad():
        before = output_of(model, batch)
    config = CordaConfig(
        corda_method="kpm", r=2, lora_alpha=2, target_modules="all-linear",
        exclude_modules=NEVER_CALLED.get(name), rank_pattern={"shared_expert_gate": 1},
    )  # fmt: skip
    calibrate(model, config, [batch], verbose=False)
    adapted = get_peft_model(model, config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        assert torch.equal(output_of(adapted, batch), before)
    assert train(adapted, batch)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    outputs = []
    for trained in (adapted, loaded):
        torch.manual_seed(2)
        with torch.no_grad():
            outputs.append(output_of(trained, batch))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], before)


def train(adapted, batch):
    """One step; returns the number of factors that moved."""
    adapted.train()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    torch.manual_seed(3)
    output_of(adapted, batch).float().square().mean().backward()
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    torch.optim.SGD(trained.values(), lr=1.0).step()
    adapted.eval()
    return sum(not torch.equal(trained[name], value) for name, value in before.items())
