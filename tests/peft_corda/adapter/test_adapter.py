"""The adapter in place: an exact start, an untouched base, and everything PEFT does with it."""

import copy

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model

from peft_corda import calibrate, initialize_corda
from tests.helpers.corda import (
    KINDS,
    calibrated,
    logits_of,
    make_batches,
    make_config,
    make_model,
    train_steps,
)


def hidden_states(model, batch):
    """Output without the head: PEFT keeps the trained copy of a classification head on unloading."""
    with torch.no_grad():
        return model.base_model(**batch).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["kpm", "ipm"])
@pytest.mark.parametrize("kind", KINDS)
def test_start_is_exact_to_the_bit(kind, method, dtype):
    batch = make_batches(seed=7)[0]
    model, config = calibrated(kind, dtype, corda_method=method)
    before = logits_of(model, batch)
    adapted = get_peft_model(model, config)
    assert torch.equal(logits_of(adapted, batch), before)
    assert all(b.any() for n, b in adapted.named_buffers() if "lora_start_B" in n)
    train_steps(adapted, batch)
    assert not torch.equal(logits_of(adapted, batch), before)


@pytest.mark.parametrize("scaling", ["balanced", "paper"])
@pytest.mark.parametrize("options", [{"lora_alpha": 16}, {"use_rslora": True}])
def test_start_is_the_projection_of_the_weight_whatever_the_scaling(options, scaling):
    model, config = calibrated("llama", corda_scaling=scaling, **options)
    adapted = get_peft_model(model, config)
    for name, layer in adapted.base_model.adapter_layers("default").items():
        directions = config.corda_factors.modules[name].directions[config.corda_method].U
        expected = directions @ directions.T @ layer.get_base_layer().weight
        a, b = layer.lora_start_A["default"], layer.lora_start_B["default"]
        torch.testing.assert_close(layer.scaling["default"] * b @ a, expected, rtol=1e-4, atol=1e-6)


def test_adapter_of_a_bfloat16_base_starts_from_float32_factors():
    model, config = calibrated("llama", torch.bfloat16)
    adapted = get_peft_model(model, config)
    for name, layer in adapted.base_model.adapter_layers("default").items():
        directions = config.corda_factors.modules[name].directions[config.corda_method].U
        expected = directions @ directions.T @ layer.get_base_layer().weight.float()
        a, b = layer.lora_start_A["default"], layer.lora_start_B["default"]
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(b @ a, expected, rtol=1e-4, atol=1e-6)  # bf16 would miss by 4e-3


def test_autocast_adapter_dtype_false_keeps_the_dtype_of_the_base():
    model, config = calibrated("llama", torch.bfloat16)
    batch = make_batches(seed=7)[0]
    before = logits_of(model, batch)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    layer = next(iter(adapted.base_model.adapter_layers("default").values()))
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    assert layer.lora_start_A["default"].dtype == torch.bfloat16
    assert torch.equal(logits_of(adapted, batch), before)


@pytest.mark.parametrize("kind", KINDS)
def test_base_weights_never_change(kind):
    model, config = calibrated(kind)
    before = copy.deepcopy(model.state_dict())
    batch = make_batches(seed=7)[0]
    expected = logits_of(model, batch)
    adapted = get_peft_model(model, config)
    train_steps(adapted, batch)
    base = {
        name.replace(".base_layer", ""): value
        for name, value in adapted.get_base_model().state_dict().items()
        if "lora_" not in name and "modules_to_save.default" not in name
    }
    base = {name.replace(".original_module", ""): value for name, value in base.items()}
    assert base.keys() == before.keys()
    assert all(torch.equal(base[name], before[name]) for name in before)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted, batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_unload_gives_the_base_model_back(kind):
    model, config = calibrated(kind)
    batch = make_batches(seed=7)[0]
    expected = hidden_states(model, batch)
    adapted = get_peft_model(model, config)
    train_steps(adapted, batch)
    assert not torch.equal(hidden_states(adapted.get_base_model(), batch), expected)
    assert torch.equal(hidden_states(adapted.unload(), batch), expected)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_computes_what_the_adapter_does_and_unmerge_undoes_it(kind, safe_merge):
    model, config = calibrated(kind, corda_method="ipm")
    batch = make_batches(seed=7)[0]
    adapted = get_peft_model(model, config)
    train_steps(adapted, batch)
    expected = logits_of(adapted, batch)
    adapted.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits_of(adapted, batch), expected, rtol=0, atol=1e-4)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits_of(adapted, batch), expected, rtol=0, atol=1e-4)
    merged = adapted.merge_and_unload(safe_merge=safe_merge)
    assert not any("lora_" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits_of(merged, batch), expected, rtol=0, atol=1e-4)


def test_two_adapters_side_by_side():
    batch = make_batches(seed=7)[0]
    model, first = calibrated("llama", corda_method="ipm")
    base = logits_of(model, batch)
    second = make_config(corda_method="kpm", r=4, lora_alpha=4)
    adapted = get_peft_model(model, first, adapter_name="first")
    train_steps(adapted, batch)
    with_first = logits_of(adapted, batch)
    calibrate(adapted, second, make_batches())
    adapted.add_adapter("second", second)
    adapted.set_adapter("second")
    assert torch.equal(logits_of(adapted, batch), base)
    train_steps(adapted, batch)
    with_second = logits_of(adapted, batch)
    adapted.set_adapter("first")
    assert torch.equal(logits_of(adapted, batch), with_first)
    mixed = adapted(**batch, adapter_names=["first", "second", "__base__", "first"]).logits
    torch.testing.assert_close(mixed[0], with_first[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], with_second[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[2], base[2], rtol=0, atol=1e-5)
    adapted.delete_adapter("first")
    adapted.set_adapter("second")
    assert torch.equal(logits_of(adapted, batch), with_second)
    assert not any("first" in key for key in adapted.state_dict())


def test_rank_pattern_and_alpha_pattern():
    model, config = calibrated("llama", rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 6})
    batch = make_batches(seed=7)[0]
    before = logits_of(model, batch)
    adapted = get_peft_model(model, config)
    shapes = {n: p.shape[0] for n, p in adapted.named_parameters() if "lora_A" in n}
    assert all(rank == (3 if "q_proj" in name else 8) for name, rank in shapes.items())
    assert torch.equal(logits_of(adapted, batch), before)


def test_smaller_rank_starts_from_the_same_factors():
    model, config = calibrated("llama", r=8)
    smaller = make_config(r=3, lora_alpha=3, corda_factors=config.corda_factors)
    adapted = get_peft_model(model, smaller)
    for name, layer in adapted.base_model.adapter_layers("default").items():
        directions = config.corda_factors.modules[name].directions[config.corda_method].U[:, :3]
        expected = directions @ directions.T @ layer.get_base_layer().weight
        a, b = layer.lora_start_A["default"], layer.lora_start_B["default"]
        torch.testing.assert_close(b @ a, expected, rtol=1e-4, atol=1e-6)


def test_initialize_corda_after_the_fact():
    batch = make_batches(seed=7)[0]
    model, config = calibrated("llama", torch.bfloat16)
    expected = get_peft_model(model, config)
    late = get_peft_model(make_model("llama", torch.bfloat16), make_config())
    initialize_corda(late, make_batches())
    assert late.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(late.state_dict()[key], value), key
    train_steps(late, batch)


def test_inject_adapter_in_model():
    model, config = calibrated("llama")
    batch = make_batches(seed=7)[0]
    before = logits_of(model, batch)
    injected = inject_adapter_in_model(config, model)
    assert torch.equal(logits_of(injected, batch), before)
    assert injected.model.layers[0].mlp.up_proj.lora_start_B["default"].any()


def test_gradients_reach_the_trained_factors_alone_and_the_input():
    model, config = calibrated("llama")
    adapted = get_peft_model(model, config)
    batch = make_batches(seed=7)[0]
    adapted.train()
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("lora_A" in name or "lora_B" in name), name
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0, name


def test_layer_is_the_virtual_residual():
    """`base(x) + s (B A x − B0 A0 x)` against the same formula on dense float64 matrices."""
    model, config = calibrated("gpt2", corda_method="ipm", lora_alpha=16)
    adapted = get_peft_model(model, config)
    train_steps(adapted, make_batches(seed=7)[0])
    layer = adapted.base_model.model.transformer.h[0].mlp.c_fc
    base = layer.get_base_layer()
    x = torch.randn(5, 48)
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    a0, b0 = layer.lora_start_A["default"].double(), layer.lora_start_B["default"].double()
    added = 2.0 * ((b0 + b) @ (a0 + a) - b0 @ a0)
    dense = base.weight.double().T + added  # Conv1D holds (in, out)
    expected = x.double() @ dense.T + base.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_dropout_acts_on_the_input_of_the_update_alone():
    """As in LoRA; in training, too, the start is exact."""
    model, config = calibrated("llama", lora_dropout=0.5)
    adapted = get_peft_model(model, config)
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(4, 48)
    assert torch.equal(layer.train()(x), layer.base_layer(x))
    with torch.no_grad():
        layer.lora_A["default"].weight.normal_(), layer.lora_B["default"].weight.normal_()
    torch.manual_seed(0)
    found = layer(x) - layer.base_layer(x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    expected = dropped @ layer.get_delta_weight("default").T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
