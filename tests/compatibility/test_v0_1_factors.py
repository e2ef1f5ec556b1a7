"""Factors of version 0.1: their tensors, reports on them, and adapters that start from them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from peft_corda import CordaConfig, allocate_ranks, report
from tests.helpers.v0_1 import (
    check_numbers,
    check_same,
    directions_of,
    expected,
    load_base,
    load_factors,
    outputs_of,
    read_json,
    start_key,
    text,
)

FACTORS = [
    f"{methods}-{weighting}"
    for methods in ("kpm", "ipm", "both")
    for weighting in ("covariance", "sqrt_covariance")
]


@pytest.mark.parametrize("name", FACTORS)
def test_factors_are_the_same_to_the_bit(name: str) -> None:
    factors = load_factors(name)
    wanted = {k: v for k, v in expected("factors", name).items() if not k.startswith("start/")}
    check_same(directions_of(factors), wanted)


@pytest.mark.parametrize("name", FACTORS)
def test_what_factors_tell_about_themselves(name: str) -> None:
    factors, about = load_factors(name), read_json("expected/factors.json")[name]
    assert list(factors.methods) == about["methods"]
    assert (factors.damping, factors.weighting) == (about["damping"], about["weighting"])
    assert factors.tokens == about["tokens"]
    assert list(factors.modules) == list(about["modules"])
    for key, wanted in about["modules"].items():
        own = factors.modules[key]
        assert list(own.shape) == wanted["shape"]
        for number in ("energy", "effective_rank", "tokens"):
            assert getattr(own, number) == wanted[number]
        assert {kind: factors.rank(key, kind) for kind in own.directions} == wanted["ranks"]


@pytest.mark.parametrize("name", FACTORS)
def test_reports_on_factors(name: str) -> None:
    reports = read_json("expected/factors.json")[name]["reports"]
    for method, wanted in reports.items():
        check_numbers(report(load_factors(name), method=method).to_dict(), wanted)


@pytest.mark.parametrize("given", ["file", "object"])
@pytest.mark.parametrize("name", FACTORS)
def test_adapters_start_from_factors(name: str, given: str) -> None:
    factors = f"factors/{name}.safetensors" if given == "file" else load_factors(name)
    config = CordaConfig(
        r=4,
        lora_alpha=4,
        corda_method="ipm" if name.startswith("ipm") else "kpm",
        corda_weighting=name.partition("-")[2],
        rank_pattern={"k_proj": 2},
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        corda_factors=factors,
    )
    model, batch = load_base("llama"), text()[0]
    before = outputs_of(model, batch)["logits"]
    adapted = get_peft_model(model, config).eval()
    assert torch.equal(outputs_of(adapted, batch)["logits"], before)
    wanted = {
        key.removeprefix("start/"): value
        for key, value in expected("factors", name).items()
        if key.startswith("start/")
    }
    state = adapted.state_dict()
    assert len(wanted) == 2 * 14
    for key, value in wanted.items():
        near = 1e-4 * float(value.abs().max())
        torch.testing.assert_close(state[start_key(key)], value, rtol=1e-4, atol=near)


def test_ranks_are_allocated_from_factors() -> None:
    factors = load_factors("both-covariance")
    ranks = allocate_ranks(factors, mean_rank=2, method="ipm")
    assert set(ranks) <= set(factors.modules) and max(ranks.values()) <= 4


def test_factors_are_saved_to_a_file_like_the_old_one(tmp_path) -> None:
    load_factors("both-covariance").save(tmp_path / "again.safetensors")
    check_same(
        load_file(tmp_path / "again.safetensors"), load_file("factors/both-covariance.safetensors")
    )
