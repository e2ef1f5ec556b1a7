"""A budget turned into ranks, and adapters that have them."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_corda import allocate_ranks, apply_ranks, calibrate
from peft_corda.config import rank_of
from tests.helpers.corda import logits_of, make_batches, make_config, make_model


@pytest.fixture(scope="module")
def factors():
    return calibrate(
        make_model("llama"),
        make_config(r=20),
        make_batches(),
        methods=("kpm", "ipm"),
        verbose=False,
    )


def parameters(factors, ranks):
    return sum(rank * sum(factors.modules[name].shape) for name, rank in ranks.items())


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_budget_is_used_up_but_not_overrun(factors, method):
    ranks = allocate_ranks(factors, 9000, method)
    assert list(ranks) == list(factors.modules)
    least = min(sum(module.shape) for module in factors.modules.values())
    assert 9000 - least < parameters(factors, ranks) <= 9000
    assert len(set(ranks.values())) > 1 and min(ranks.values()) >= 1


def test_mean_rank_is_the_budget_of_a_uniform_rank(factors):
    uniform = 6 * sum(sum(module.shape) for module in factors.modules.values())
    assert allocate_ranks(factors, method="ipm", mean_rank=6) == allocate_ranks(
        factors, uniform, "ipm"
    )


def test_budget_for_everything_gives_all_directions(factors):
    ranks = allocate_ranks(factors, 10**9, "kpm")
    assert ranks == {name: 20 for name in factors.modules}


def test_min_rank(factors):
    ranks = allocate_ranks(factors, method="kpm", mean_rank=5, min_rank=4)
    assert min(ranks.values()) == 4 < max(ranks.values())


def test_ipm_captures_more_than_uniform_ranks(factors):
    def captured(ranks):
        return sum(
            float(module.directions["ipm"].S[: ranks[name]].square().sum()) / module.energy
            for name, module in factors.modules.items()
        )

    uniform = dict.fromkeys(factors.modules, 4)
    assert captured(allocate_ranks(factors, method="ipm", mean_rank=4)) > captured(uniform)


def test_kpm_leaks_less_than_uniform_ranks_at_worst(factors):
    def leaked(ranks):
        return max(
            float(module.directions["kpm"].S[ranks[name] - 1]) ** 2 / module.energy
            for name, module in factors.modules.items()
        )

    uniform = dict.fromkeys(factors.modules, 4)
    assert leaked(allocate_ranks(factors, method="kpm", mean_rank=4)) < leaked(uniform)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_adapters_with_these_ranks(factors, method, use_rslora, tmp_path):
    config = make_config(
        r=8, lora_alpha=12, corda_method=method, corda_factors=factors, use_rslora=use_rslora
    )
    ranks = allocate_ranks(factors, method=method, mean_rank=8)
    applied = apply_ranks(config, ranks)
    batch = make_batches(seed=5)[0]
    before = logits_of(make_model("llama"), batch)
    model = get_peft_model(make_model("llama"), applied)
    assert trainable(model) == parameters(factors, ranks)
    assert trainable(model) <= trainable(get_peft_model(make_model("llama"), config))
    scale = 12 / (math.sqrt(8) if use_rslora else 8)
    for name, layer in model.base_model.adapter_layers("default").items():
        assert layer.r["default"] == ranks[name]
        assert layer.scaling["default"] == pytest.approx(scale)
    assert torch.equal(logits_of(model, batch), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits_of(PeftModel.from_pretrained(make_model("llama"), tmp_path), batch), before
    )


def test_the_config_is_left_alone_and_its_own_patterns_are_kept_up(factors):
    config = make_config(
        rank_pattern={"q_proj": 4, "up_proj": 2}, alpha_pattern={"q_proj": 16},
        corda_factors=factors,
    )  # fmt: skip
    applied = apply_ranks(config, {"model.layers.0.self_attn.q_proj": 6, "m.up_proj": 3, "m.x": 5})
    assert (config.rank_pattern, config.alpha_pattern) == (
        {"q_proj": 4, "up_proj": 2},
        {"q_proj": 16},
    )
    assert applied.corda_factors is factors and (applied.r, applied.lora_alpha) == (8, 8)
    # 16 / 4 in q_proj, 8 / 2 in up_proj, 8 / 8 elsewhere.
    assert applied.alpha_pattern == {
        "model.layers.0.self_attn.q_proj": 24, "m.up_proj": 12, "m.x": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        ["layers.0.fc", "decoder.layers.0.fc"],
        ["decoder.layers.0.fc", "layers.0.fc"],
        ["a.b", "a_b", "x.a.b"],
        ["a_b", "a.b"],
    ],
)
def test_names_that_look_like_others_get_their_own_rank(names):
    ranks = {name: 2 + number for number, name in enumerate(names)}
    applied = apply_ranks(make_config(), ranks)
    assert {name: rank_of(applied, name) for name in names} == ranks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 100}, r"budget of 100 parameters is too small: min_rank=1 in all 14 modules"),
        ({"mean_rank": 2, "min_rank": 3}, "is too small: min_rank=3"),
        ({"budget": 9000, "method": "best"}, "method must be one of"),
        ({"budget": 9000, "method": None}, "factors hold 'kpm' and 'ipm'. Say which one"),
        ({}, "exactly one of budget and mean_rank, got budget=None and mean_rank=None"),
        ({"budget": 9000, "mean_rank": 4}, "exactly one of budget and mean_rank, got budget=9000"),
        ({"budget": 0}, "budget must be a number greater than 0, got 0"),
        ({"mean_rank": float("nan")}, "mean_rank must be a number greater than 0, got nan"),
        ({"budget": 10**6, "min_rank": 21}, "min_rank=21 is more than the factors hold for model"),
        ({"budget": 9000, "min_rank": 0}, "min_rank must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_input(factors, options, message):
    with pytest.raises(ValueError, match=message):
        allocate_ranks(factors, **{"method": "kpm", **options})


def test_apply_ranks_needs_a_corda_config_and_whole_ranks():
    with pytest.raises(TypeError, match="must be a peft_corda.CordaConfig, got LoraConfig"):
        apply_ranks(LoraConfig(), {"a": 1})
    for rank in (0, 1.5, True):
        with pytest.raises(ValueError, match="rank of a must be a whole number of at least 1, got"):
            apply_ranks(make_config(), {"a": rank})
