"""Every path of CorDA that moves tensors, on one device and in every precision, against the CPU."""

import copy
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from kprune_ext.common.precision import adds_narrow
from peft_corda import calibrate, export_lora
from peft_corda.decomposition.covariance import CovarianceAccumulator, CrossAccumulator
from peft_corda.decomposition.directions import decompose
from tests.helpers.corda import (
    KINDS,
    logits_of,
    make_batches,
    make_config,
    make_model,
    padded_batches,
    train_steps,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative differences that rounding explains, between two devices and between two ways to compute.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_method = pytest.mark.parametrize("method", ["kpm", "ipm"])


def on(device, batches):
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def calibrated_on(device, dtype, kind="llama", **options):
    """A model on the device, and a config with its factors."""
    model, config = make_model(kind, dtype).to(device), make_config(kind, **options)
    calibrate(model, config, on(device, padded_batches()), progress=False)
    return model, config


@torch.no_grad()
def nudge(model):
    """Move the adapter away from where it started, in place of training."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(0.01 * torch.randn_like(parameter))


def difference(one, other):
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm())


@each_dtype
@each_method
@pytest.mark.parametrize("kind", KINDS)
def test_start_is_exact(device, kind, method, dtype):
    base = make_model(kind, dtype).to(device)
    batch = on(device, make_batches())[0]
    expected = logits_of(base, batch)
    model = get_peft_model(*calibrated_on(device, dtype, kind, corda_method=method))
    assert torch.equal(logits_of(model, batch), expected)
    # A classifier's head is trained in the model's dtype, and Adam's epsilon is zero in float16.
    train_steps(model, batch) if dtype != torch.float16 else nudge(model)
    changed = logits_of(model, batch)
    assert torch.isfinite(changed).all()
    assert not torch.equal(changed, expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), expected)


@each_dtype
@each_method
def test_factors_are_those_of_the_cpu(device, method, dtype):
    found = calibrated_on(device, dtype, corda_method=method)[1].corda_factors
    expected = calibrated_on(torch.device("cpu"), dtype, corda_method=method)[1].corda_factors
    assert found.modules.keys() == expected.modules.keys()
    for name, module in found.modules.items():
        own, other = module.directions[method], expected.modules[name].directions[method]
        assert own.U.device.type == "cpu"
        assert difference(own.U.T @ own.U, torch.eye(own.rank)) < 1e-5
        tolerance = ROUNDING[dtype]
        assert difference(own.S, other.S) < 10 * tolerance, name
        assert module.energy == pytest.approx(expected.modules[name].energy, rel=10 * tolerance)
        assert module.tokens == expected.modules[name].tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 77, 3000, 9000])
def test_sums_of_16_bit_inputs_keep_their_digits(device, dtype, tokens):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, 200, generator=generator).mul_(torch.logspace(-2, 2, 200)).to(dtype)
    outputs = torch.randn(tokens, 40, generator=generator).to(dtype)
    plain, cross = CovarianceAccumulator(200, device), CrossAccumulator(200, 40, device)
    plain.update(rows.to(device))
    plain.update(rows.to(device))
    cross.update_pair(rows.to(device), outputs.to(device))
    exact = rows.double().T @ rows.double() / tokens
    found = plain.finish().matrix.double().cpu()
    scale = exact.diagonal().sqrt()
    assert ((found - exact) / torch.outer(scale, scale)).abs().max() < 2e-5
    product = outputs.double().T @ rows.double() / tokens
    assert difference(cross.finish().matrix, product) < 2e-5


def test_a_gpu_adds_16_bit_products_without_a_copy(device):
    if device.type != "cuda":
        pytest.skip("only CUDA devices have such products")
    total = torch.zeros(8, 8, device=device)
    assert adds_narrow(total, total.bfloat16())
    assert adds_narrow(total, total.half())
    assert not adds_narrow(total, total)


@each_method
@pytest.mark.parametrize("shape", [(96, 48), (48, 96), (600, 520), (520, 1300)])
def test_directions_capture_as_much_as_on_the_cpu(device, method, shape):
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(0, -3, columns)
    inputs = torch.randn(2 * columns, columns, generator=generator) * torch.logspace(0, -1, columns)
    covariance = inputs.T @ inputs / len(inputs)
    rank = 16
    product = weight.double() @ covariance.double()
    best = torch.linalg.svdvals(product).square()
    best = float(best[:rank].sum() if method == "ipm" else best[-rank:].sum())
    found, _ = decompose(weight.to(device), covariance.to(device), rank, method)
    basis = torch.linalg.qr(found.U.double().cpu()).Q
    energy = float((basis.T @ product).square().sum())
    assert energy == pytest.approx(best, rel=2e-3 if method == "ipm" else 1e-2)


@each_dtype
def test_saving_and_loading(device, dtype, tmp_path):
    model = get_peft_model(*calibrated_on(device, dtype))
    batch = on(device, make_batches())[0]
    train_steps(model, batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model("llama", dtype).to(device), tmp_path).eval()
    assert {p.device.type for p in again.parameters()} == {device.type}
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))


@each_dtype
def test_merging_and_exporting(device, dtype, tmp_path):
    model = get_peft_model(*calibrated_on(device, dtype))
    batch = on(device, make_batches())[0]
    train_steps(model, batch)
    expected = logits_of(model, batch)
    model.save_pretrained(tmp_path / "corda")
    export_lora(tmp_path / "corda", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in tensors.values())
    plain = PeftModel.from_pretrained(make_model("llama", dtype).to(device), tmp_path / "lora")
    assert difference(logits_of(plain, batch), expected) < ROUNDING[dtype]
    merged = model.merge_and_unload()
    assert difference(logits_of(merged, batch), expected) < ROUNDING[dtype]


@each_dtype
def test_a_step_is_that_of_the_cpu(device, dtype):
    _, config = calibrated_on(torch.device("cpu"), torch.float32)
    gradients = []
    for place in (torch.device("cpu"), device):
        model = get_peft_model(make_model("llama", dtype).to(place), copy.deepcopy(config)).train()
        batch = on(place, make_batches())[0]
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append(
            torch.cat(
                [p.grad.double().cpu().flatten() for p in model.parameters() if p.requires_grad]
            )
        )
    # The signs of the directions are arbitrary, and so are those of the gradients.
    assert difference(gradients[1].abs(), gradients[0].abs()) < 2 * ROUNDING[dtype]


def test_a_compiled_step(device):
    if device.type != "cuda":
        pytest.skip("the suite compiles elsewhere on the CPU")
    model = get_peft_model(*calibrated_on(device, torch.bfloat16)).train()
    batch = on(device, make_batches())[0]
    expected = model(**batch).logits
    assert difference(torch.compile(model)(**batch).logits, expected) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_starts_exactly(device, precision):
    model, config = calibrated_on(device, torch.float32)
    batch = on(device, make_batches())[0]
    with torch.autocast(device.type, precision):
        expected = logits_of(model, batch)
    model = get_peft_model(model, config)
    with torch.autocast(device.type, precision):
        assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_bases(device, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=99, num_attention_heads=4, num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    options = {
        "4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
        "8bit": {"load_in_8bit": True},
    }[bits]
    load = partial(
        AutoModelForCausalLM.from_pretrained,
        tmp_path,
        quantization_config=BitsAndBytesConfig(**options),
        dtype=torch.bfloat16,
        device_map={"": device},
    )
    batch = on(device, make_batches())[0]
    base = load()
    expected = logits_of(base, batch)
    corda = make_config()
    calibrate(base, corda, on(device, make_batches()), progress=False)
    model = get_peft_model(base, corda)
    assert torch.equal(logits_of(model, batch), expected)
    train_steps(model, batch)
    assert torch.isfinite(logits_of(model, batch)).all()
    assert not torch.equal(logits_of(model, batch), expected)


def test_an_offloaded_base(device):
    expected = calibrated_on(device, torch.float32)[1].corda_factors
    model, config = make_model("llama"), make_config()
    cpu_offload(model, device)
    calibrate(model, config, on(device, padded_batches()), progress=False)
    for name, module in config.corda_factors.modules.items():
        assert module.energy == pytest.approx(expected.modules[name].energy, rel=1e-3)


def test_sums_that_take_several_passes(device):
    config = make_config()
    model = make_model("llama").to(device)
    calibrate(model, config, on(device, padded_batches()), max_memory=40_000, progress=False)
    expected = calibrated_on(device, torch.float32)[1].corda_factors
    for name, module in config.corda_factors.modules.items():
        own, other = module.directions["kpm"].S, expected.modules[name].directions["kpm"].S
        assert difference(own, other) < 1e-3
