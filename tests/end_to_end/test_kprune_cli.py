"""The command `kprune`, from options to files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTImageProcessor,
)

from kprune_ext import KPruneReport, LatencyTable
from kprune_ext.cli.main import main
from kprune_ext.cli.prune import prune_config
from kprune_ext.command_inputs.options import PruneOptions
from tests.helpers.kprune import tiny_bert, word_tokenizer
from tests.helpers.kprune_models import tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a model, a tokenizer and a data file."""
    folder = tmp_path / "source"
    tiny_bert().save_pretrained(folder)
    word_tokenizer(folder).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "text": " ".join(f"word{n}" for n in torch.randint(0, 50, (7,), generator=generator)),
            "other": f"word{row % 9}",
            "label": row % 3,
        }
        for row in range(60)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def prune(source: Path, out: Path, *more: str) -> None:
    main(
        [
            "prune",
            f"--model={source}",
            f"--data={source / 'data.jsonl'}",
            f"--out={out}",
            *more,
        ]
    )


def test_prune_writes_a_model_that_loads(source: Path, tmp_path: Path, capsys) -> None:
    prune(source, tmp_path / "out", "--reduction", "0.6", "--plot", str(tmp_path / "kept.png"))
    printed = capsys.readouterr().out
    assert "budget 40.0%" in printed and "heads" in printed
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")("word3 word4", return_tensors="pt")
    assert model(**words).logits.shape == (1, 3)
    report = KPruneReport.load_json(tmp_path / "out" / "kprune_report.json")
    assert report.cost <= 0.4 * report.cost_before
    assert report.samples == 60
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_a_pruned_model_is_pruned_again(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "once", "--reduction", "0.3")
    prune(
        tmp_path / "once",
        tmp_path / "twice",
        "--reduction",
        "0.3",
        "--data",
        str(source / "data.jsonl"),
    )
    once, twice = (
        KPruneReport.load_json(tmp_path / name / "kprune_report.json") for name in ("once", "twice")
    )
    assert twice.flops_before == once.flops


def test_report(source: Path, tmp_path: Path, capsys) -> None:
    prune(source, tmp_path / "out", "--text_field", '["text", "other"]')
    capsys.readouterr()
    copies = [str(tmp_path / name) for name in ("copy.json", "copy.png")]
    main(["report", str(tmp_path / "out"), "--json", copies[0], "--plot", copies[1]])
    assert "K-prune: what is kept of each layer" in capsys.readouterr().out
    stored = KPruneReport.load_json(tmp_path / "out" / "kprune_report.json")
    assert KPruneReport.load_json(copies[0]) == stored
    assert Path(copies[1]).stat().st_size > 1000


def test_latency_table_is_written_and_used_again(source: Path, tmp_path: Path) -> None:
    options = ["--metric", "latency", "--latency", str(tmp_path / "latency.json")]
    prune(source, tmp_path / "one", *options, "--reduction", "0.2")
    table = LatencyTable.load(tmp_path / "latency.json")
    assert (table.batch_size, table.sequence_length) == (32, 32)  # of 64, as many as it has
    before = (tmp_path / "latency.json").read_bytes()
    prune(source, tmp_path / "two", *options, "--reduction", "0.2")
    assert (tmp_path / "latency.json").read_bytes() == before


def test_images(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Image
    from PIL import Image as Picture

    folder = tmp_path / "source"
    tiny("vit").save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    pictures = [Picture.new("RGB", (20, 20), (9 * n, 90, 250 - 9 * n)) for n in range(20)]
    Dataset.from_dict({"image": pictures}, Features({"image": Image()})).to_parquet(
        folder / "data.parquet"
    )
    data = ["--data", str(folder / "data.parquet")]
    main(["prune", "--model", str(folder), "--out", str(tmp_path / "out"), *data])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model(pixel_values=torch.zeros(1, 3, 16, 16)).logits.shape == (1, 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reduction", "1.5"], r"reduction=1.5 is outside"),
        (["--text_field", "sentence"], "no field 'sentence'; their fields are text, other, label"),
        (["--data", "missing.csv"], "No data file at 'missing.csv'"),
        (["--batch_size", "0"], "at least 1"),
        (["--task", "image-classification"], "Unrecognized configuration class"),
        (["--reduction", "0.9999"], "cannot be reached"),
    ],
)
def test_mistakes_leave_nothing_behind(
    source, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        prune(source, tmp_path / "out", *more)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_with_something_in_it_is_left_alone(source: Path) -> None:
    before = sorted(path.name for path in source.iterdir())
    with pytest.raises(SystemExit, match="holds other files"):
        prune(source, source)
    assert sorted(path.name for path in source.iterdir()) == before


def test_reports_of_another_kind(source: Path) -> None:
    with pytest.raises(SystemExit, match="is not a report of kprune"):
        main(["report", str(source / "config.json")])
    with pytest.raises(SystemExit, match=r"kprune report: error: .*kprune_report.json"):
        main(["report", str(source)])


def test_options_reach_the_engine() -> None:
    options = PruneOptions("m", "d", "o", ridge=0.5, schedule="per_sublayer", seed=4)
    config = prune_config(options)
    assert (config.ridge, config.schedule, config.seed) == (0.5, "per_sublayer", 4)
    paper = prune_config(PruneOptions("m", "d", "o", reduction=0.7, paper=True, max_tokens=9))
    assert (paper.mu, paper.reduction, paper.max_tokens) == (64.0, 0.7, 9)
