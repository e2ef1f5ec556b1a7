"""Usual operations of scripts that use a LoRA, with a CORDA adapter in its place."""

import copy
import pickle

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from peft_corda import CordaConfig, calibrate, initialize_corda
from tests.helpers.corda import (
    adapters_of_transformers,
    bytes_of,
    logits_of,
    make_batches,
    make_config,
    make_model,
    train_steps,
)

BATCH = make_batches()[0]


def adapted(kind="llama", train=True, **options):
    model, config = make_model(kind), make_config(kind, **options)
    calibrate(model, config, make_batches())
    model = get_peft_model(model, config)
    if train:
        train_steps(model, BATCH)
    return model.eval()


def two_adapters():
    """`first` and `second`, trained apart."""
    model = make_model("llama")
    config = make_config()
    calibrate(model, config, make_batches())
    model = get_peft_model(model, config, adapter_name="first")
    other = make_config(corda_method="ipm", r=3)
    calibrate(model.get_base_model(), other, make_batches())
    model.add_adapter("second", other)
    for name in ("first", "second"):
        model.set_adapter(name)
        train_steps(model, BATCH)
    return model.eval()


def logits_with(model, name):
    if name == "__base__":
        with model.disable_adapter():
            return logits_of(model, BATCH)
    model.set_adapter(name)
    return logits_of(model, BATCH)


def test_rows_of_a_batch_use_different_adapters():
    model = two_adapters()
    names = ["first", "second", "__base__", "second"]
    expected = torch.stack([logits_with(model, name)[row] for row, name in enumerate(names)])
    with torch.no_grad():
        mixed = model(**BATCH, adapter_names=names).logits
    assert torch.allclose(mixed, expected, atol=1e-5)


def test_adapter_is_deleted_without_a_trace():
    model = two_adapters()
    expected = logits_with(model, "second")
    model.delete_adapter("first")
    assert torch.equal(logits_of(model, BATCH), expected)
    assert not [key for key in model.state_dict() if "first" in key]
    assert not any("first" in m.started for m in model.modules() if hasattr(m, "started"))


def test_several_adapters_are_saved_and_loaded_by_name(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make_model("llama"), tmp_path / "first", adapter_name="first"
    )
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("first", "second"):
        assert torch.equal(logits_with(loaded, name), logits_with(model, name))


def test_state_dict_moves_an_adapter_to_another_model():
    model = adapted()
    other = get_peft_model(make_model("llama"), make_config())
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(logits_of(other.eval(), BATCH), logits_of(model, BATCH))


@pytest.fixture
def adapters_allowed():
    with adapters_of_transformers():
        yield


@pytest.mark.usefixtures("adapters_allowed")
def test_adapter_of_transformers_own(tmp_path):
    """`PreTrainedModel.add_adapter`, `load_adapter` and friends, without a `PeftModel`."""
    expected = logits_of(make_model("llama"), BATCH)
    model, config = make_model("llama"), make_config()
    calibrate(model, config, make_batches())
    model.add_adapter(config, adapter_name="own")
    assert torch.equal(logits_of(model, BATCH), expected)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    optimizer.step()
    trained = logits_of(model.eval(), BATCH)
    assert not torch.equal(trained, expected)
    model.disable_adapters()
    assert torch.equal(logits_of(model, BATCH), expected)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    loaded = make_model("llama")
    loaded.load_adapter(str(tmp_path), adapter_name="own")
    assert torch.equal(logits_of(loaded.eval(), BATCH), trained)


def test_trained_token_embeddings(tmp_path):
    tokens = {"embed_tokens": [3, 7]}
    model = adapted(trainable_token_indices=tokens)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path)
    assert torch.equal(logits_of(loaded.eval(), BATCH), logits_of(model, BATCH))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("embed_tokens" in key for key in saved)
    merged = model.merge_and_unload()
    assert torch.allclose(logits_of(merged, BATCH), logits_of(loaded, BATCH), atol=1e-4)


def test_modules_to_save(tmp_path):
    model = adapted("bert", modules_to_save=["classifier"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path)
    assert torch.equal(logits_of(loaded.eval(), BATCH), logits_of(model, BATCH))
    assert any("classifier" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    def gradients(model):
        model.train()
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    expected = gradients(adapted())
    model = adapted()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], atol=1e-6), name


def test_compiled_model_gives_the_same():
    model = adapted()
    expected = logits_of(model, BATCH)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(logits_of(compiled, BATCH), expected, atol=1e-5)
    model.train()
    compiled(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    assert found
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad, atol=1e-6), name


def test_exported_program_gives_the_same():
    model = adapted()
    base = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 5, 48)
    program = torch.export.export(base, (x,))
    assert torch.allclose(program.module()(x), base(x), atol=1e-6)


def test_configs_are_copied_and_pickled():
    model, config = make_model("llama"), make_config(rank_pattern={"q_proj": 2})
    calibrate(model, config, make_batches())
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin.to_dict() == config.to_dict()
        assert bytes_of(twin.corda_factors) == bytes_of(config.corda_factors)


def test_copied_model_is_independent():
    model = adapted()
    twin = copy.deepcopy(model)
    expected = logits_of(model, BATCH)
    assert torch.equal(logits_of(twin, BATCH), expected)
    train_steps(twin, BATCH)
    assert torch.equal(logits_of(model, BATCH), expected)


def test_config_and_model_by_their_auto_classes(tmp_path):
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    config = make_config(base_model_name_or_path=str(tmp_path / "base"))
    calibrate(base, config, make_batches())
    model = get_peft_model(base, config)
    train_steps(model, BATCH)
    model.save_pretrained(tmp_path / "adapter")
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "adapter"), CordaConfig)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(loaded.eval(), BATCH), logits_of(model.eval(), BATCH))


@pytest.mark.parametrize("adapter_dtype", [True, False])
def test_autocast_training(adapter_dtype):
    base = make_model("llama", torch.bfloat16)
    config = make_config()
    calibrate(base, config, make_batches())
    model = get_peft_model(base, config, autocast_adapter_dtype=adapter_dtype).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**BATCH, labels=BATCH["input_ids"]).loss
    loss.backward()
    wanted = torch.float32 if adapter_dtype else torch.bfloat16
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    for parameter in trained:
        assert parameter.dtype == parameter.grad.dtype == wanted
        assert parameter.grad.isfinite().all()


def test_alpha_and_rank_changed_later_scale_the_update():
    """`set_scale` and `scale_layer`, as diffusers and others call them."""
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    before = layer.get_delta_weight("default")
    layer.scale_layer(2.0)
    assert torch.allclose(layer.get_delta_weight("default"), 2 * before)
    layer.unscale_layer()
    assert torch.allclose(layer.get_delta_weight("default"), before)


def test_linear_layers_of_a_plain_module():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))
    x = torch.randn(7, 12)
    expected = net(x)
    config = CordaConfig(r=3, target_modules=["0", "2"])
    calibrate(net, config, [{"input": x}])
    model = get_peft_model(net, config)
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        for layer in model.base_model.adapter_layers("default").values():
            layer.lora_B["default"].weight += 0.1
    trained = model(x)
    assert torch.allclose(model.merge_and_unload()(x), trained, atol=1e-5)


def test_optimizer_made_before_the_start_trains_it():
    model = get_peft_model(make_model("llama"), make_config())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    initialize_corda(model, make_batches())
    model.train()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    optimizer.step()
    for layer in model.base_model.adapter_layers("default").values():
        change_a, change_b, *_ = layer.factors_of("default")
        assert change_a.any() and change_b.any()
