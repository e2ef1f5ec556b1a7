"""What PEFT's LoRA layer can do: in-place changes, hooks, transforms, second derivatives."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, vmap

from peft_corda import CordaConfig, calibrate
from tests.helpers.architectures import batch_of, build, output_of

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net():
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)
    return nn.Sequential(*layers).double()


@pytest.fixture(params=["lora", "corda"])
def adapted(request):
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["0", "2"]}
    if request.param == "lora":
        model = get_peft_model(net(), LoraConfig(**options))
    else:
        base, config = net(), CordaConfig(corda_method="kpm", **options)
        calibrate(base, config, [{"input": X}] * 2, verbose=False)
        model = get_peft_model(base, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss(model, parameters, x):
    return functional_call(model, parameters, (x[None],)).square().sum()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "name",
    ["FalconForCausalLM", "LongformerForSequenceClassification", "LEDForConditionalGeneration"],
)
def test_models_that_change_outputs_in_place(name, dropout):
    model, batch = build(name), batch_of(name)
    config = CordaConfig(
        corda_method="kpm", r=2, lora_dropout=dropout, target_modules="all-linear",
        exclude_modules=".*_global",
    )  # fmt: skip
    calibrate(model, config, [batch], verbose=False)
    output_of(get_peft_model(model, config).train(), batch).square().mean().backward()


def test_output_changed_in_place(adapted):
    layer = adapted.base_model.model[0]
    layer(X).mul_(2).relu_().sum().backward()
    found = layer.lora_A["default"].weight.grad.clone()
    layer.zero_grad()
    (layer(X) * 2).relu().sum().backward()
    torch.testing.assert_close(found, layer.lora_A["default"].weight.grad)


def test_per_sample_gradients(adapted):
    parameters = trained(adapted)
    found = vmap(grad(lambda p, x: loss(adapted, p, x)), in_dims=(None, 0))(parameters, X)
    leaves = [p for p in adapted.parameters() if p.requires_grad]
    for row in range(len(X)):
        expected = torch.autograd.grad(adapted(X[row : row + 1]).square().sum(), leaves)
        for mine, theirs in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(mine[row], theirs)


def test_ensembles_and_second_derivatives(adapted):
    parameters = trained(adapted)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    outputs = vmap(lambda p: functional_call(adapted, p, (X,)))(stacked)
    torch.testing.assert_close(outputs[0], adapted(X))
    hessian(lambda p: loss(adapted, p, X[0]))(parameters)
    assert jacfwd(adapted)(X).shape == (5, 4, 5, 8)


def test_gradients_of_gradients(adapted):
    def function(x, *values):
        return functional_call(adapted, dict(zip(trained(adapted), values, strict=True)), (x,))

    inputs = [t.clone().requires_grad_() for t in (X[:2], *trained(adapted).values())]
    torch.autograd.gradgradcheck(function, inputs)
    torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)


def test_traced(adapted):
    torch.testing.assert_close(torch.jit.trace(adapted, (X,))(X), adapted(X))


def test_hooks_on_factors(adapted):
    layer, seen, handles = adapted.base_model.model[0], {}, []

    def watch(name, module):
        handles.append(
            module.register_forward_hook(lambda _, given, __: seen.update({f"{name} in": given[0]}))
        )
        handles.append(
            module.register_full_backward_hook(
                lambda _, __, out: seen.update({f"{name} out": out[0]})
            )
        )

    factors = {"A": layer.lora_A["default"], "B": layer.lora_B["default"]}
    for name, module in factors.items():
        watch(name, module)
    adapted(X).square().sum().backward()
    for name, module in factors.items():
        product = torch.einsum("no,ni->oi", seen[f"{name} out"], seen[f"{name} in"].detach())
        torch.testing.assert_close(product, module.weight.grad)
    for handle in handles:
        handle.remove()


def test_global_hooks(adapted):
    called = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(module)
    )
    try:
        adapted(X)
    finally:
        handle.remove()
    assert adapted.base_model.model[0].lora_A["default"] in called


def test_replaced_factor(adapted):
    layer, calls = adapted.base_model.model[0], []

    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    layer.lora_A["default"].__class__ = Counting
    adapted(X)
    assert calls == [len(X)]
