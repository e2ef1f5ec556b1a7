"""CORDA adapters on 4-bit and 8-bit bases of bitsandbytes, on the CPU."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torchao.quantization import Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from peft_corda import CordaConfig, CordaFactors, calibrate
from peft_corda.base_model.quantized import is_packed, quantization_of, unpacked
from peft_corda.base_model.weights import dense_weight
from tests.helpers.corda import logits_of, make_batches, make_config, train_steps

KINDS = ["4bit", "8bit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with sides that are multiples of the blocks of 4-bit weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(folder, kind=None):
    if kind is None:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {
        "4bit": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        },
        "8bit": {"load_in_8bit": True},
    }[kind]
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32,
        device_map="cpu",
    )  # fmt: skip


def codes_of(model):
    """Codes of quantised weights, whether an evaluation pass has packed them or not."""
    return {
        name: (
            unpacked(module.weight)[0] if is_packed(module.weight) else module.weight.data
        ).clone()
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    }


def assert_same(codes, others):
    assert codes.keys() == others.keys()
    assert codes
    assert all(torch.equal(codes[name], others[name]) for name in codes)


def adapted(folder, kind, **options):
    model, config = load(folder, kind), make_config(**options)
    calibrate(model, config, make_batches())
    return get_peft_model(model, config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_start_is_exact_and_the_base_untouched(folder, kind, method):
    base = load(folder, kind)
    batch, before = make_batches()[0], codes_of(base)
    assert quantization_of(base.model.layers[0].self_attn.q_proj) == kind
    expected = logits_of(base, batch)
    config = make_config(corda_method=method)
    calibrate(base, config, make_batches())
    model = get_peft_model(base, config)
    assert torch.equal(logits_of(model, batch), expected)
    train_steps(model, batch)
    assert not torch.equal(logits_of(model, batch), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), expected)
    assert_same(codes_of(model.unload()), before)


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_the_projection_of_what_the_layer_multiplies_by(folder, kind):
    model = adapted(folder, kind)
    for name, layer in model.base_model.adapter_layers("default").items():
        base = layer.get_base_layer()
        if kind == "4bit":
            identity = torch.eye(base.in_features)
            base.train()  # else it is packed on some CPUs, with rounded scales
            weight = (base(identity) - (0 if base.bias is None else base.bias)).T
            assert torch.allclose(dense_weight(name, base), weight, atol=1e-6)
        _, _, factor_a, factor_b = layer.factors_of("default")
        directions = torch.linalg.qr(factor_b).Q
        projection = directions @ directions.T @ dense_weight(name, base).float()
        product = layer.scaling["default"] * factor_b @ factor_a
        assert torch.allclose(product, projection, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_the_dense_model_start_the_quantised_one(folder, kind, tmp_path):
    dense, config = load(folder), make_config()
    calibrate(dense, config, make_batches()).save(tmp_path / "factors.safetensors")
    base = load(folder, kind)
    expected = logits_of(base, make_batches()[0])
    other = make_config(corda_factors=str(tmp_path / "factors.safetensors"))
    model = get_peft_model(base, other)
    assert torch.equal(logits_of(model, make_batches()[0]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_another_model_are_refused(folder, kind, tmp_path):
    torch.manual_seed(1)
    other = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    config = make_config()
    calibrate(other, config, make_batches())
    assert isinstance(config.corda_factors, CordaFactors)
    with pytest.raises(ValueError, match="belong to another base model"):
        get_peft_model(load(folder, kind), config)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_adapter_reloads(folder, kind, tmp_path):
    model = adapted(folder, kind)
    batch = make_batches()[0]
    train_steps(model, batch)
    expected = logits_of(model, batch)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(load(folder, kind), tmp_path)
    assert torch.equal(logits_of(reloaded, batch), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_is_as_close_as_the_quantisation_allows(folder, kind, safe_merge):
    model = adapted(folder, kind)
    batch = make_batches()[0]
    train_steps(model, batch)
    logits_of(model, batch)  # an evaluation pass, which may change the layout of the weights
    layers = model.base_model.adapter_layers("default")
    wanted = {
        name: dense_weight(name, layer.get_base_layer()).float()
        + layer.get_delta_weight("default").float()
        for name, layer in layers.items()
    }
    expected = logits_of(model, batch)
    model.merge_adapter(safe_merge=safe_merge)
    for name, layer in layers.items():
        merged = dense_weight(name, layer.get_base_layer()).float()
        error = {"4bit": 0.2, "8bit": 0.006}[kind] * wanted[name].abs().max()
        assert (merged - wanted[name]).abs().max() <= error, name
        assert quantization_of(layer.get_base_layer()) == kind
    close = {"4bit": 0.3, "8bit": 0.05}[kind] * expected.norm()
    assert (logits_of(model, batch) - expected).norm() < close
    model.unmerge_adapter()
    assert (logits_of(model, batch) - expected).norm() < close


@pytest.mark.parametrize("kind", KINDS)
def test_broken_adapter_is_not_merged(folder, kind):
    model = adapted(folder, kind)
    before = codes_of(model)
    layer = next(iter(model.base_model.adapter_layers("default").values()))
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    name, codes = next(iter(codes_of(layer).items()))
    assert torch.equal(codes, next(v for k, v in before.items() if k.endswith(name)))


def pack(layer):
    """What an evaluation pass makes of a 4-bit weight on CPUs with bfloat16 instructions."""
    state = copy.deepcopy(layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, state
    )
    assert is_packed(layer.weight)


def test_packed_weight_is_read_right():
    for compress in (False, True):
        torch.manual_seed(0)
        dense = torch.nn.Linear(128, 64)
        layer = bnb.nn.Linear4bit(
            128, 64, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=compress
        )
        layer.load_state_dict(dense.state_dict())
        layer = layer.to("cpu")
        plain = dense_weight("layer", layer)
        pack(layer)
        packed = layer.weight.data.clone()
        # The packed scales are bfloat16.
        found = dense_weight("layer", layer)
        assert (found - plain).abs().max() < 0.005 * plain.abs().max()
        assert torch.equal(layer.weight.data, packed)
        assert is_packed(layer.weight)


def test_calibration_packs_no_weight(folder):
    base = load(folder, "4bit").eval()
    layers = [module for module in base.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # packs in evaluation mode, whatever the CPU
    before = [(layer.weight.data.clone(), layer.weight.quant_state.absmax) for layer in layers]
    calibrate(base, make_config(), make_batches())
    assert len(before) == 14
    for layer, (codes, scales) in zip(layers, before, strict=True):
        assert not is_packed(layer.weight)
        assert not layer.training
        assert torch.equal(layer.weight.data, codes)
        assert torch.equal(layer.weight.quant_state.absmax, scales)


def test_gradients_after_an_evaluation_pass(folder):
    """As when a trainer evaluates between two steps; a packed weight has no gradient."""
    model = adapted(folder, "4bit").train()
    layer = next(iter(model.base_model.adapter_layers("default").values()))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer(x).sum(), x)
    for mode in (True, False):
        pack(layer.get_base_layer())
        (found,) = torch.autograd.grad(layer.train(mode)(x).sum(), x)
        assert (found - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_for_training_with_checkpointing(folder, kind):
    """The usual QLoRA script."""
    base = prepare_model_for_kbit_training(load(folder, kind))
    config = make_config()
    calibrate(base, config, make_batches())
    model = get_peft_model(base, config)
    before = codes_of(model)
    train_steps(model, make_batches()[0])
    assert_same(codes_of(model), before)
    for layer in model.base_model.adapter_layers("default").values():
        change_a, change_b, *_ = layer.factors_of("default")
        assert change_a.any() and change_b.any()


class TestTorchao:
    """8-bit weights of torchao."""

    @staticmethod
    def load(folder):
        return LlamaForCausalLM.from_pretrained(
            folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
        )

    def test_start_training_saving_and_merging(self, folder, tmp_path):
        base, batch = self.load(folder), make_batches()[0]
        assert quantization_of(base.model.layers[0].mlp.up_proj) == "torchao"
        expected = logits_of(base, batch)
        config = make_config()
        calibrate(base, config, make_batches())
        model = get_peft_model(base, config)
        assert torch.equal(logits_of(model, batch), expected)
        train_steps(model, batch)
        trained = logits_of(model, batch)
        assert not torch.equal(trained, expected)
        model.save_pretrained(tmp_path)
        reloaded = PeftModel.from_pretrained(self.load(folder), tmp_path)
        assert torch.equal(logits_of(reloaded, batch), trained)
        merged = model.merge_and_unload()
        assert (logits_of(merged, batch) - trained).norm() < 0.05 * trained.norm()

    def test_factors_of_the_dense_model(self, folder):
        dense, config = load(folder), make_config()
        calibrate(dense, config, make_batches())
        base = self.load(folder)
        expected = logits_of(base, make_batches()[0])
        assert torch.equal(logits_of(get_peft_model(base, config), make_batches()[0]), expected)


def test_layers_of_other_packages_are_refused():
    class GPTQLinear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))

        def forward(self, x):
            return x

    net = torch.nn.Sequential(GPTQLinear())
    with pytest.raises(ValueError, match="0 is a GPTQLinear.*they support.*bitsandbytes"):
        get_peft_model(net, CordaConfig(r=2, target_modules=["0"]))
    assert type(net[0]) is GPTQLinear
