"""Targets that match nothing, experts that only LoRA trains, and ranks that narrow layers allow."""

import re
import warnings

import pytest
import transformers
from torch import nn

from peft_corda.base_model.targets import find_targets
from tests.helpers.architectures import build
from tests.helpers.corda import make_config, make_model

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def warnings_of(model, **options):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        find_targets(model, make_config(r=1, **options))
    return [str(w.message) for w in seen if "target_modules" in str(w.message)]


def test_unmatched_names_are_listed():
    (message,) = warnings_of(make_model("llama"), target_modules=["q_proj", "wq", "c_attn"])
    assert "No module of LlamaForCausalLM matches 'c_attn', 'wq' in target_modules." in message


@pytest.mark.parametrize(
    "targets", ["all-linear", SEVEN, ["layers.0.mlp.up_proj"], r".*\.q_proj", None]
)
def test_no_warning_where_everything_matches(targets):
    assert not warnings_of(make_model("llama"), target_modules=targets)


@pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules")
@pytest.mark.parametrize("is_explicit", [False, True])
@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("Qwen3MoeForCausalLM", ["down_proj", "gate_proj", "up_proj"]),
        ("MixtralForCausalLM", ["w1", "w2", "w3"]),
    ],
)
def test_fused_experts_are_named(name, experts, is_explicit):
    targets = ["q_proj", *experts] if is_explicit else "all-linear"
    (message,) = warnings_of(build(name), target_modules=targets)
    assert "LoRA would also train" in message and "Use peft.LoraConfig" in message
    if is_explicit:
        assert f"matches {', '.join(map(repr, experts))}" in message
    assert not warnings_of(build(name), target_modules=["q_proj", "k_proj"])


def narrow_model():
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp.router = nn.Linear(48, 3)
    model.score = nn.Linear(48, 2)
    model.model.layers[1].mlp.down_proj = nn.Linear(48, 5)  # the other one is wide enough
    return model


@pytest.mark.parametrize("exclude", [None, ["v_proj"], r".*\.v_proj"])
def test_one_entry_mends_all_narrow_layers(exclude):
    options = {"rank_pattern": {"q_proj": 4, "score": 5}, "exclude_modules": exclude}
    with pytest.raises(ValueError, match=r"r=8 is larger than module model\.layers") as caught:
        find_targets(narrow_model(), make_config(**options))
    message = str(caught.value)
    assert "and 3 more" in message and "for 4 of" in message
    ranks = eval(re.search(r"rank_pattern=(\{.*?\}),", message)[1])
    excluded = eval(re.search(r"exclude_modules=('.*')\.$", message)[1])
    found = find_targets(narrow_model(), make_config(**{**options, "rank_pattern": ranks}))
    left = find_targets(narrow_model(), make_config(**{**options, "exclude_modules": excluded}))
    assert len(found) - len(left) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": float("inf")}, "`lora_alpha` must be greater than 0 and finite, got inf"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "`alpha_pattern` of 'q_proj' must be .* nan"),
        ({"lora_alpha": "16"}, "`lora_alpha` must be greater than 0 and finite, got '16'"),
        (
            {"corda_damping": float("inf")},
            "`corda_damping` must be a number of at least 0, got inf",
        ),
        ({"rank_pattern": {"q_proj": 0}}, "`rank_pattern` must map to whole numbers .* got 0"),
        ({"rank_pattern": {"q_proj": 2.5}}, "`rank_pattern` must map to whole numbers .* got 2.5"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)
    config = make_config()
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        find_targets(make_model("llama"), config)
