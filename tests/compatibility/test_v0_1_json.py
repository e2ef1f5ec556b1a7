"""Latency tables, reports and options that version 0.1 wrote as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kprune_ext import KPruneConfig, KPruneReport, LatencyTable, kprune, load_report
from peft_corda import report
from tests.helpers.v0_1 import DATA, check_numbers, load_base, load_factors, read_json, text


def test_latency_table() -> None:
    table = LatencyTable.load("json/latency.json")
    assert table == LatencyTable(
        device="cpu",
        batch_size=4,
        sequence_length=12,
        heads={0: 1e-5, 2: 3e-5, 4: 4.5e-5},
        neurons={0: 5e-6, 8: 1e-5, 16: 2.5e-5, 32: 3e-5},
    )
    assert table.costs("attention", 4)[1] == pytest.approx(2e-5)
    config = KPruneConfig(reduction=0.5, metric="latency")
    pruned: Any = kprune(load_base("bert"), text(), config, latency=table, progress=False)
    assert pruned.kprune_report.cost <= 0.5 * pruned.kprune_report.cost_before


def test_report_of_a_pruning() -> None:
    found = KPruneReport.load_json("json/kprune_report.json")
    assert found == load_report("json/kprune_report.json") == load_report("pruned/bert")
    check_numbers(found.to_dict(), read_json("json/kprune_report.json"), rel=1e-12)


def test_report_on_factors_has_what_it_had() -> None:
    found = report(load_factors("both-covariance"), method="ipm").to_dict()
    check_numbers(found, read_json("json/corda_report.json"))


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("config", KPruneConfig()),
        ("config-paper", KPruneConfig.paper(0.4, seed=7, max_state_memory="1GiB")),
    ],
)
def test_options_of_a_pruning(name: str, made: KPruneConfig) -> None:
    """Also, no default has another value for encoders by now."""
    found = KPruneConfig.from_dict(
        json.loads((DATA / "json" / f"{name}.json").read_text(encoding="utf-8"))
    )
    kind = {"is_causal": False, "next_tokens": False}
    assert found.meant_for(**kind) == made.meant_for(**kind)
    check_numbers(found.to_dict(), read_json(f"json/{name}.json"), rel=0)
