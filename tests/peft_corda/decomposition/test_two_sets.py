"""SC-LoRA and LoRA-Null against direct dense computations, alone and through whole models."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_corda import allocate_ranks, calibrate, forgetting, report
from peft_corda.base_model.targets import find_targets
from peft_corda.decomposition.starting_factors import null_factors, starting_factors
from peft_corda.decomposition.two_sets import contrasted, least_inputs, null_directions
from tests.helpers.corda import (
    covariances_of,
    logits_of,
    make_batches,
    make_config,
    make_model,
    train_steps,
)

SHAPES = [(48, 48), (40, 96), (96, 40)]
TASK, KEEP = make_batches(3, seed=11), make_batches(4, seed=23)


def covariance(size, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(5 * size, size, generator=generator, dtype=torch.float64)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    inputs = inputs * torch.logspace(0, -2, size, dtype=torch.float64) @ torch.linalg.qr(mixing).Q
    return inputs.T @ inputs / len(inputs)


def weight_of(shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_contrasted_directions_are_the_leading_eigenvectors(shape, beta):
    weight, task, keep = weight_of(shape), covariance(shape[1], 0), covariance(shape[1], 1)
    found, energy = contrasted(weight, task, keep, 6, beta)
    learned = weight @ task @ weight.T
    contrast = (1 - beta) * learned - beta * weight @ keep @ weight.T
    values = torch.linalg.eigvalsh(contrast)
    reached = found.U.double()
    torch.testing.assert_close(reached.T @ reached, torch.eye(6).double(), rtol=0, atol=1e-5)
    gains = (reached.T @ contrast @ reached).diagonal()
    wanted = values.flip(0)[:6]
    if shape[0] > shape[1]:  # zeros, of directions that no output has, are left out
        basis = torch.linalg.qr(weight).Q
        wanted = torch.linalg.eigvalsh(basis.T @ contrast @ basis).flip(0)[:6]
    torch.testing.assert_close(gains, wanted, rtol=1e-4, atol=1e-5)
    assert energy == pytest.approx(float(learned.trace()))
    torch.testing.assert_close(
        found.S.double().square(), (reached.T @ learned @ reached).diagonal(), rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(
        found.weight_norms.double(), (reached.T @ weight).norm(dim=1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("size", [40, 500])
def test_least_inputs_are_the_last_eigenvectors(size):
    """The larger size takes the way by iteration."""
    matrix = covariance(size, 0)
    vectors, roots = least_inputs(matrix, 5)
    values = torch.linalg.eigvalsh(matrix)[:5]
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(5).double(), rtol=0, atol=1e-8)
    assert float((vectors.T @ matrix @ vectors).trace()) == pytest.approx(
        float(values.sum()), rel=0.01
    )
    assert float(roots.square().sum()) == pytest.approx(float(values.sum()), rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_null_factors(shape, scale):
    weight = weight_of(shape)
    vectors, roots = least_inputs(covariance(shape[1], 0), 5)
    found = null_directions(weight, vectors, roots)
    a, b = null_factors(weight, found.U, scale)
    wanted = weight @ vectors @ vectors.T
    torch.testing.assert_close(scale * (b @ a).double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(a), torch.linalg.svdvals(b))
    norms = (weight @ vectors).norm(dim=0)
    torch.testing.assert_close(found.weight_norms.double(), norms, rtol=1e-5, atol=1e-5)


def started(method, dtype=torch.float32, **options):
    base = make_model("llama", dtype)
    config = make_config(corda_method=method, **options)
    data = {"keep": KEEP} if method == "sc_lora" else {}
    factors = calibrate(base, config, TASK, progress=False, **data)
    return get_peft_model(base, config), factors


@pytest.mark.parametrize("method", ["sc_lora", "lora_null"])
@pytest.mark.parametrize("limit", [None, 60_000])
def test_whole_models(method, limit, tmp_path):
    base, config = make_model("llama"), make_config(corda_method=method, corda_beta=0.7)
    before = logits_of(base, TASK[0])
    data = {"keep": KEEP} if method == "sc_lora" else {}
    targets = find_targets(base, config)
    task, keep = covariances_of(base, targets, TASK), covariances_of(base, targets, KEEP)
    factors = calibrate(base, config, TASK, limit, progress=False, **data)
    factors.save(tmp_path / "factors")
    options = {"corda_method": method, "corda_beta": 0.7}
    model = get_peft_model(base, make_config(corda_factors=str(tmp_path / "factors"), **options))
    assert torch.equal(logits_of(model, TASK[0]), before)
    for name, layer in model.base_model.adapter_layers("default").items():
        weight, own = layer.get_base_layer().weight.double(), task[name].matrix.double()
        _, _, a, b = layer.factors_of("default")
        if method == "sc_lora":
            u = contrasted(weight, own, keep[name].matrix, 8, 0.7)[0].U
            wanted = starting_factors(weight, u, u[0], "balanced", 1.0)
            wanted = (wanted[1] @ wanted[0]).double()
        else:
            v = torch.linalg.eigh(own).eigenvectors[:, :8]
            wanted = weight @ v @ v.T
        error = ((b @ a).double() - wanted).norm() / wanted.norm()
        assert error < 2e-2, name
    train_steps(model, TASK[0])
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded, TASK[0]), logits_of(model, TASK[0]))
    # Forgetting is measured on what is to be kept.
    kept = calibrate(
        make_model("llama"), make_config(), KEEP if method == "sc_lora" else TASK, progress=False
    )
    assert forgetting(model, factors).value == pytest.approx(
        forgetting(model, kept).value, rel=1e-3
    )
    assert report(factors).method == method
    with pytest.raises(ValueError, match="not for"):
        allocate_ranks(factors, mean_rank=2)


def test_null_starts_where_the_inputs_are_least():
    shares = {}
    for method in ("lora_null", "ipm"):
        model, _ = started(method, target_modules=["down_proj"])
        layers = model.base_model.adapter_layers("default")
        with torch.no_grad():  # take the start away
            for layer in layers.values():
                layer.lora_A["default"].weight.copy_(-layer.lora_start_A["default"])
        with_sketch = calibrate(
            make_model("llama"), make_config(target_modules=["down_proj"]), TASK, progress=False
        )
        shares[method] = forgetting(model, with_sketch).relative
    assert shares["lora_null"] < 0.2 * shares["ipm"]


def test_frozen_a():
    """LoRA-Null's second version trains `B` alone."""
    model, _ = started("lora_null")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    train_steps(model, TASK[0])
    for layer in model.base_model.adapter_layers("default").values():
        change_a, change_b, *_ = layer.factors_of("default")
        assert not change_a.any() and change_b.any()


def test_refusals():
    model = make_model("llama")
    with pytest.raises(ValueError, match="needs batches of the knowledge to keep.*keep is missing"):
        calibrate(model, make_config(corda_method="sc_lora"), TASK, progress=False)
    with pytest.raises(ValueError, match="is only for corda_method='sc_lora'.*keep is given"):
        calibrate(model, make_config(), TASK, keep=KEEP, progress=False)
    with pytest.raises(ValueError, match="may be found together"):
        calibrate(model, make_config(), TASK, methods=("kpm", "lora_null"), progress=False)
    for beta in (-0.1, 1.1, None, float("nan")):
        with pytest.raises(ValueError, match="`corda_beta` must be a number between 0 and 1"):
            make_config(corda_beta=beta)


def test_checkpoints_of_two_sets(tmp_path):
    config = make_config(corda_method="sc_lora")
    arguments = {"progress": False, "checkpoint_dir": tmp_path / "c"}
    first = calibrate(make_model("llama"), config, TASK, 60_000, keep=KEEP, **arguments)
    again = calibrate(make_model("llama"), config, TASK, 60_000, keep=KEEP, **arguments)
    for name, module in first.modules.items():
        found = again.modules[name].directions["sc_lora"]
        assert torch.equal(found.U, module.directions["sc_lora"].U)
    with pytest.raises(ValueError, match="first batch of keep differ"):
        calibrate(make_model("llama"), config, TASK, 60_000, keep=KEEP[::-1], **arguments)
