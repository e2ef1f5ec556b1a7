"""KPruneConfig: defaults, checks, and its forms on disk."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kprune_ext import KPruneConfig
from kprune_ext.preparation.given import given_model
from tests.helpers.kprune_models import tiny


def test_every_option_is_explained() -> None:
    for field in dataclasses.fields(KPruneConfig):
        assert field.metadata["help"].endswith("."), field.name


def test_goes_through_a_dict() -> None:
    config = KPruneConfig(reduction=0.7, mu=32.0, sequence_length=64, schedule="per_sublayer")
    assert KPruneConfig.from_dict(config.to_dict()) == config
    assert KPruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("reduction", [0, 1, -0.1, 1.5, 50])
def test_reduction_outside_0_and_1(reduction: float) -> None:
    with pytest.raises(ValueError, match=r"reduction=.* is outside \(0, 1\).*pass 0.5"):
        KPruneConfig(reduction=reduction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": float("nan")}, "not finite"),
        ({"temperature": 0.0}, "not positive"),
        ({"ridge": -1}, "negative"),
        ({"metric": "time"}, "flops, params, latency"),
        ({"sensitivity": "taylor"}, "fisher, gradient"),
        ({"problem_type": "ranking"}, "None, single_label_classification"),
        ({"max_state_memory": "much"}, "is not a valid size"),
        ({"max_state_memory": -1}, "is not a valid size"),
        ({"mu": -1.0}, "not positive"),
        ({"lambda_rep": -1e-4}, "negative"),
        ({"score_fraction": 0.0}, r"outside \(0, 1\]"),
        ({"score_fraction": 1.1}, r"outside \(0, 1\]"),
        ({"min_share": -0.1}, r"outside \[0, 1\]"),
        ({"lambda_scale": "log"}, "relative, absolute"),
        ({"max_tokens": 0}, "Pass 1 or more"),
        ({"sequence_length": 0}, "Pass 1 or more"),
        ({"schedule": "sometimes"}, "per_layer, per_sublayer"),
    ],
)
def test_values_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KPruneConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "half"},
        {"seed": 1.5},
        {"max_tokens": True},
        {"tune_bias": 1},
        {"scale_logits": "no"},
        {"scale_logits": 1},
        {"unread_weight": "1"},
        {"mu": "head size"},
    ],
)
def test_values_of_another_type(options: dict) -> None:
    with pytest.raises(TypeError, match="is not a"):
        KPruneConfig(**options)


WRONG = object()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(KPruneConfig)])
def test_every_option_is_checked(name: str) -> None:
    """Whatever an option may be, it is not any object."""
    with pytest.raises((TypeError, ValueError), match=f"{name}="):
        KPruneConfig(**{name: WRONG})


def test_unknown_option() -> None:
    with pytest.raises(ValueError, match=r"Unknown option sparsity.*reduction"):
        KPruneConfig.from_dict({"sparsity": 0.5})


@pytest.mark.parametrize(
    ("task", "meant"), [("sequence", (1.0, 8)), ("embeddings", (1.0, 8)), ("answers", (0.1, 3))]
)
def test_what_options_stand_for_depends_on_the_predictions(task: str, meant: tuple) -> None:
    model = tiny("bert", task)
    found = given_model(model, None).options(KPruneConfig())
    assert (found.lambda_rep, found.max_score_passes) == meant
    own = KPruneConfig(lambda_rep=0.0, max_score_passes=5)
    found = given_model(model, None).options(own)
    assert (found.lambda_rep, found.max_score_passes) == (0.0, 5)
    found = given_model(model, lambda model, batch: model(**batch)[0]).options(KPruneConfig())
    assert (found.lambda_rep, found.max_score_passes) == (1.0, 8)  # who knows what these are
