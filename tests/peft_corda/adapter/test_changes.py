"""What is trained is the change from the start: decay pulls to the base, 16 bits suffice."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_corda import CordaConfig, calibrate
from tests.helpers.corda import adapters_of_transformers, calibrated, logits_of, make_batches
from tests.helpers.v0_1 import DATA, expected, load_base, outputs_of, text

BATCH = make_batches(seed=7)[0]
X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GOAL = torch.randn(64, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_decay_without_a_gradient_leaves_the_base_to_the_bit(method):
    model, config = calibrated("llama", corda_method=method)
    before = logits_of(model, BATCH)
    adapted = get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    for _ in range(5000):
        optimizer.step()
    assert torch.equal(logits_of(adapted, BATCH), before)


def test_decay_after_training_goes_back_to_the_base():
    model, config = calibrated("llama")
    before = logits_of(model, BATCH)
    adapted = get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.02 * torch.randn_like(parameter)
    moved = (logits_of(adapted, BATCH) - before).norm()
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=1.0)
    for _ in range(300):
        optimizer.step()
    assert (logits_of(adapted, BATCH) - before).norm() < 0.1 * moved


def net(dtype=torch.float64, rank=3):
    """Two layers with adapters, started from data."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    config = CordaConfig(r=rank, target_modules=["0", "2"], corda_method="ipm")
    calibrate(base, config, [{"input": X}], progress=False)
    return get_peft_model(base.to(dtype), config, autocast_adapter_dtype=False)


class Whole(nn.Module):
    """A layer in the old form: `A` and `B` are trained themselves, beside copies of their start."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.scale = layer.get_base_layer(), layer.scaling["default"]
        _, _, a, b = layer.factors_of("default")
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.a0, self.b0 = a.clone(), b.clone()

    def forward(self, x):
        added = F.linear(F.linear(x, self.a), self.b) - F.linear(F.linear(x, self.a0), self.b0)
        return self.base(x) + self.scale * added


def in_the_old_form(model):
    layers = model.base_model.model
    old = nn.Sequential(Whole(layers[0]), nn.Tanh(), Whole(layers[2]))
    for name, parameter in old.named_parameters():
        parameter.requires_grad_("base" not in name)
    return old


def losses(model, steps, dtype=torch.float64, **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **options)
    seen = []
    for _ in range(steps):
        loss = F.mse_loss(model(X.to(dtype)).float(), GOAL.float())
        if dtype == torch.float64:
            loss = F.mse_loss(model(X), GOAL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    return seen


def test_without_decay_training_is_that_of_the_factors_themselves():
    new = net()
    old = in_the_old_form(copy.deepcopy(new))
    options = {"lr": 1e-2, "weight_decay": 0.0}
    assert losses(new, 50, **options) == pytest.approx(losses(old, 50, **options), rel=1e-9)
    torch.testing.assert_close(new(X), old(X), rtol=1e-9, atol=1e-9)
    assert losses(new, 1, **options)[0] < 0.9 * losses(net(), 1, **options)[0]


def test_in_bfloat16_it_learns_where_the_factors_themselves_stand_still():
    """Steps of this size are below half the spacing of bfloat16 next to entries of the start."""
    new = net(torch.bfloat16)
    old = in_the_old_form(copy.deepcopy(new))
    options = {"lr": 1e-4, "weight_decay": 0.0, "dtype": torch.bfloat16}
    ours, theirs = losses(new, 200, **options), losses(old, 200, **options)
    exact = losses(net(), 200, lr=1e-4, weight_decay=0.0)
    gained = exact[0] - exact[-1]
    assert ours[0] - ours[-1] > 0.8 * gained
    assert theirs[0] - theirs[-1] < 0.3 * gained


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_old_adapter_is_converted_or_refused_by_transformers_own_loader(name, monkeypatch):
    monkeypatch.chdir(DATA)
    model = load_base(name)
    with adapters_of_transformers():
        model.load_adapter(f"adapters/{name}", adapter_name="old")
    wanted = expected("adapters", name)["logits"]
    try:
        found = outputs_of(model.eval(), text()[0])["logits"]
    except RuntimeError as error:
        assert "before version 0.2" in str(error) and "save it again" in str(error)
    else:
        torch.testing.assert_close(found, wanted, rtol=3e-5, atol=3e-5)


def test_adapter_of_a_later_format_is_refused(tmp_path):
    model, config = calibrated("llama")
    get_peft_model(model, config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"corda_format": 2', '"corda_format": 3'))
    with pytest.raises(ValueError, match="has format 3, but .* reads formats 1 to 2.*Update"):
        PeftModel.from_pretrained(calibrated("llama")[0], tmp_path)
