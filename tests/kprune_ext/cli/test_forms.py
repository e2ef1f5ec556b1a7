"""Reports and plans of `kprune`, as they are printed and shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kprune_ext import KPruneReport, SubLayerReport
from kprune_ext.cli.main import main
from tests.helpers.kprune_decoders import tiny_decoder


@pytest.fixture
def report() -> KPruneReport:
    row = SubLayerReport("a<b>", 0, "attention", 1, 2, 10, 20, 30, 60, 0.25)
    layers = [replace(row, layer=n, kind=kind) for n in range(40) for kind in ("attention", "ffn")]
    return KPruneReport(
        tuple(layers), "flops", 0.5, 800, 800, 1600, 8, 10, 99, 4_000, 6_000, perplexity=3.0,
        perplexity_before=2.0, held_out_tokens=9,
    )  # fmt: skip


def test_a_report_is_short_in_a_repl(report: KPruneReport) -> None:
    assert len(repr(report).splitlines()) <= 20
    assert repr(report).startswith("KPruneReport of 80 sub-layers") and "perplexity" in repr(report)
    assert len(str(report).splitlines()) > 80


def test_a_report_is_a_table_in_a_notebook(report: KPruneReport) -> None:
    shown = report._repr_html_()
    assert shown.count("<tr>") == 41 and "<pre>layers: " in shown and "<td>1 / 2</td>" in shown


def test_the_command_prints_each_form(report: KPruneReport, tmp_path, capsys) -> None:
    report.save_json(tmp_path / "report.json")
    main(["report", str(tmp_path / "report.json"), "--format=json"])
    assert KPruneReport.from_dict(json.loads(capsys.readouterr().out)) == report
    main(["report", str(tmp_path / "report.json"), "--format", "md"])
    said = capsys.readouterr().out
    assert (
        said.startswith("| layer | heads |") and said.count("\n| ") == 41 and "\n- model: " in said
    )
    main(["report", str(tmp_path / "report.json")])
    assert "K-prune: what is kept of each layer" in capsys.readouterr().out


def test_a_plan_has_seconds(tmp_path, capsys) -> None:
    tiny_decoder("llama").save_pretrained(tmp_path / "model")
    where = tmp_path / "plan.json"
    main(
        [
            "plan",
            f"--model={tmp_path / 'model'}",
            "--max_tokens=2000",
            "--max_length=16",
            f"--json={where}",
        ]
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Takes a") and "GFLOP/s" in last and "(cpu)" in last
    plan = json.loads(where.read_text())
    assert 0 < plan["seconds"] < 60
