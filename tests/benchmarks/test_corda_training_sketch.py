"""Forgetting from sketches beside forgetting by running the model, on a tiny model."""

import json

import local_text

from benchmarks.corda_training import sketch


def test_larger_sketches_are_more_exact(tiny_model, tmp_path):
    (tmp_path / "wikitext2").mkdir()
    text = " ".join(" ".join(pair) for pair in local_text.facts()) * 20
    (tmp_path / "wikitext2" / "train.txt").write_text(text)
    sketch.main(
        [
            *("--data", str(tmp_path), "--model", tiny_model, "--results", str(tmp_path)),
            *("--rows", "2", "512", "--windows", "4", "--steps", "2", "--rank", "2"),
        ]
    )
    runs = json.loads((tmp_path / "corda_sketch.json").read_text())["runs"]
    none, small, full = runs
    assert (none["rows"], "bytes" in none) == (0, False)
    for update in ("trained", "random"):
        assert full[update]["all"] < 0.02  # with a row per dimension, bfloat16 is all that is lost
        assert full[update]["worst"] < small[update]["worst"]
        assert full[update]["exact"] > 0
    assert small["bytes"] < full["bytes"]
    assert "| 512 |" in (tmp_path / "corda_sketch.md").read_text()
