"""A latency table, reports, options, and configs of both console programs."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from pathlib import Path

from make_kprune import LATENCY

from kprune_ext import KPruneConfig, load_report
from peft_corda import CordaFactors, report


def printed(run: Callable[[list[str]], None], arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        run(arguments)
    return text.getvalue()


def write_json_files() -> None:
    folder = Path("json")
    folder.mkdir(exist_ok=True)
    LATENCY.save(folder / "latency.json")
    factors = CordaFactors.load("factors/both-covariance.safetensors")
    report(factors, method="ipm").save_json(folder / "corda_report.json")
    load_report("pruned/bert").save_json(folder / "kprune_report.json")
    (folder / "config.json").write_text(KPruneConfig().to_json() + "\n")
    paper = KPruneConfig.paper(0.4, seed=7, max_state_memory="1GiB")
    (folder / "config-paper.json").write_text(paper.to_json() + "\n")
    corda, prune = (importlib.import_module(f"{name}.cli") for name in ("peft_corda", "kprune_ext"))
    given = ["--model=org/name", "--data=texts.jsonl", "--r=8", "--rank_pattern={q_proj: 3}"]
    given += ["--target_modules=[q_proj,v_proj]", "--max_memory=4GiB", "--pack"]
    lines = printed(corda.main, ["calibrate", *given, "--output=f.safetensors", "--print_config"])
    (folder / "calibrate.yaml").write_text(lines)
    given = ["--model=org/name", "--data=texts.jsonl", "--out=pruned", "--reduction=0.6"]
    lines = printed(prune.main, ["prune", *given, "--text_field=[a,b]", "--print_config"])
    (folder / "prune.yaml").write_text(lines)
