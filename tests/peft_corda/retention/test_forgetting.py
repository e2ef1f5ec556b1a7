"""Forgetting from sketches, against the change of the outputs that really are seen."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_corda
from peft_corda import (
    CordaConfig,
    CordaFactors,
    Forgetting,
    calibrate,
    fit_to_budget,
    forgetting,
)
from tests.helpers.corda import KINDS, logits_of, make_batches, make_config, make_model

BATCHES = make_batches(6)
KINDS_OF_ADAPTERS = ["corda", "lora"]


def adapted(kind="corda", model="llama", size=0.05, method="kpm", **options):
    """A model with a trained adapter, and the factors of a calibration."""
    base, config = make_model(model), make_config(model, corda_method=method, **options)
    factors = calibrate(base, config, BATCHES, progress=False)
    if kind == "lora":
        same = ("r", "lora_alpha", "target_modules", "task_type", "alpha_pattern", "use_rslora")
        config = LoraConfig(**{name: getattr(config, name) for name in same})
    found = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return found, factors


def seen(model, batches=BATCHES):
    """Root of the mean of `‖ΔW x‖² / ‖x‖²`, and of `‖ΔW x‖² / ‖W x‖²`, by module, from its calls."""
    sums = {}

    def watch(name, layer):
        def hook(module, args, output):
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            base = module.get_base_layer()
            weight = base.weight.T if hasattr(base, "nf") else base.weight
            update = module.get_delta_weight("default")
            update = update.T if hasattr(base, "nf") else update
            own = sums.setdefault(name, [0.0, 0.0, 0.0])
            own[0] += float((x @ update.double().T).square().sum())
            own[1] += float(x.square().sum())
            own[2] += float((x @ weight.double().T).square().sum())

        return layer.register_forward_hook(hook)

    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    hooks = [
        watch(name, layer)
        for name, layer in layers.items()
        if isinstance(layer.lora_A, nn.ModuleDict)
    ]
    with model.disable_adapter():  # the inputs of calibration
        for batch in batches:
            logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    return {k: (math.sqrt(d / x), math.sqrt(d / y)) for k, (d, x, y) in sums.items()}


@pytest.mark.parametrize("kind", KINDS_OF_ADAPTERS)
@pytest.mark.parametrize("method", ["kpm", "ipm"])
@pytest.mark.parametrize("model", KINDS)
def test_it_is_what_the_layers_do(model, kind, method):
    found, factors = adapted(kind, model, method=method)
    measured, wanted = forgetting(found, factors), seen(found)
    assert {module.name for module in measured.modules} == set(wanted)
    # Layers of 48 inputs have exact sketches. With ipm, the wide ones have random rows alone.
    for module in measured.modules:
        near = (
            0.01
            if factors.sketches[factors.modules[module.name].inputs].rows.shape[1] <= 64
            else 0.4
        )
        assert module.forgetting == pytest.approx(wanted[module.name][0], rel=near), module.name
        assert module.relative == pytest.approx(wanted[module.name][1], rel=near), module.name
    mean = sum(value**2 for value, _ in wanted.values()) / len(wanted)
    assert measured.value == pytest.approx(mean**0.5, rel=0.1)


def test_a_start_forgets_nothing_and_decay_of_weights_keeps_it_so():
    found, factors = adapted(size=0.0)
    assert float(forgetting(found, factors)) == 0.0


def test_what_it_looks_like(tmp_path):
    found, factors = adapted()
    measured = forgetting(found, factors)
    assert isinstance(measured, Forgetting)
    assert repr(measured) == (
        f"Forgetting({measured.value:.4g}, relative={measured.relative:.4g}, modules=14)"
    )
    assert measured.table().row_count == 15
    measured.save_json(tmp_path / "f.json")
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["forgetting"] == measured.value and len(written["modules"]) == 14


def test_factors_in_a_file_and_without_directions(tmp_path):
    found, factors = adapted()
    expected = forgetting(found, factors)
    factors.save(tmp_path / "whole")
    factors.without_directions().save(tmp_path / "small")
    for name in ("whole", "small"):
        assert forgetting(found, str(tmp_path / name)) == expected
        assert forgetting(found, CordaFactors.load(tmp_path / name)) == expected
    assert (tmp_path / "small").stat().st_size < (tmp_path / "whole").stat().st_size
    with pytest.raises(ValueError, match="corda_method"):
        get_peft_model(make_model("llama"), make_config(corda_factors=str(tmp_path / "small")))


def test_sketches_can_be_left_out():
    config = make_config(corda_sketch=0)
    factors = calibrate(make_model("llama"), config, BATCHES, progress=False)
    assert not factors.sketches
    found, _ = adapted()
    with pytest.raises(ValueError, match="no sketch of the inputs of .*Calibrate again"):
        forgetting(found, factors)
    for given in (1, -2, 2.5, None):
        with pytest.raises(ValueError, match="`corda_sketch` must be 0 or a whole number"):
            make_config(corda_sketch=given)


class TestBudget:
    @pytest.mark.parametrize("kind", KINDS_OF_ADAPTERS)
    @pytest.mark.parametrize(
        "options",
        [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}, "lora_alpha": 12}],
        ids=str,
    )
    def test_it_is_kept_saved_and_loaded(self, kind, options, tmp_path, monkeypatch):
        found, factors = adapted(kind, **options)
        before, real = forgetting(found, factors), seen(found)
        budget = 0.3 * before.value
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("a forward pass"))
            after = fit_to_budget(found, factors, forgetting=budget)
        assert after.value == pytest.approx(budget, rel=1e-5)
        now = seen(found)
        for name in real:  # every layer by the same factor
            assert now[name][0] == pytest.approx(0.3 * real[name][0], rel=1e-4)
        whole = (sum(value**2 for value, _ in now.values()) / len(now)) ** 0.5
        assert whole == pytest.approx(budget, rel=0.02)
        found.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path).eval()
        assert torch.equal(logits_of(loaded, BATCHES[0]), logits_of(found, BATCHES[0]))
        assert forgetting(loaded, factors) == after

    def test_within_the_budget_nothing_changes(self):
        found, factors = adapted()
        before = logits_of(found, BATCHES[0])
        fit_to_budget(found, factors, forgetting=10.0)
        assert torch.equal(logits_of(found, BATCHES[0]), before)
        assert found.peft_config["default"].lora_alpha == 8

    @pytest.mark.parametrize("given", [0, -1, float("nan"), float("inf"), "0.1", None])
    def test_budgets_that_are_none(self, given):
        found, factors = adapted()
        with pytest.raises(ValueError, match="must be a number greater than 0"):
            fit_to_budget(found, factors, forgetting=given)

    def test_merged(self):
        found, factors = adapted()
        found.merge_adapter()
        with pytest.raises(ValueError, match="is merged.*unmerge_adapter"):
            fit_to_budget(found, factors, forgetting=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "is not a plain LoRA"),
        ({"lora_bias": True}, "is not a plain LoRA .lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens, which is not linear"),
        ({"target_modules": ["q_proj", "lm_head"]}, "no sketch of the inputs of lm_head"),
    ],
)
def test_adapters_that_are_refused(options, message):
    _, factors = adapted()
    model = get_peft_model(
        make_model("llama"), LoraConfig(**{"target_modules": ["q_proj"], **options})
    )
    with pytest.raises(ValueError, match=message):
        forgetting(model, factors)


def test_models_and_names_that_are_refused():
    found, factors = adapted()
    with pytest.raises(
        TypeError, match="no LoRA or CORDA adapter named 'other'; it has .'default'"
    ):
        forgetting(found, factors, "other")
    with pytest.raises(TypeError, match="none active"):
        forgetting(make_model("llama"), factors)
    base = nn.Sequential(nn.Linear(12, 20))
    config = CordaConfig(r=3, target_modules=["0"])
    other = calibrate(base, config, [{"input": torch.randn(7, 12)}], progress=False)
    wider = get_peft_model(nn.Sequential(nn.Linear(16, 20)), LoraConfig(r=3, target_modules=["0"]))
    with pytest.raises(ValueError, match="another base model: 0 has the shape"):
        forgetting(wider, other)
    assert peft_corda.forgetting is forgetting
