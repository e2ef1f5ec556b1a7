"""Batches from files of text."""

import json

import pytest
import torch

from kprune_ext.common.text_data import load_rows, packed_batches, padded_batches, read_texts
from tests.helpers.text import SENTENCES, make_tokenizer


def test_fields_are_joined_blank_rows_left_out_and_the_order_is_seeded(tmp_path):
    rows = [{"q": f"w{i}", "a": "w1" if i % 2 else ""} for i in range(8)] + [{"q": " ", "a": ""}]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    loaded = load_rows(str(path))
    in_order = [text for (text,) in read_texts(loaded, [["q", "a"]], seed=None)]
    assert in_order[:3] == ["w0", "w1\nw1", "w2"] and len(in_order) == 8
    shuffled = [text for (text,) in read_texts(loaded, [["q", "a"]], seed=3)]
    assert shuffled != in_order and sorted(shuffled) == sorted(in_order)
    assert shuffled == [text for (text,) in read_texts(loaded, [["q", "a"]], seed=3)]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "json"])
def test_kinds_of_files(suffix, tmp_path):
    import pandas as pd

    frame, path = pd.DataFrame({"text": ["w1, w2", "w3"]}), str(tmp_path / f"d.{suffix}")
    if suffix == "parquet":
        frame.to_parquet(path)
    elif suffix == "json":
        frame.to_json(path, orient="records")
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    assert list(read_texts(load_rows(path), [["text"]], seed=None)) == [("w1, w2",), ("w3",)]


def test_padding_is_masked_and_nothing_is_lost():
    texts = [(text,) for text in SENTENCES]
    batches = padded_batches(texts, make_tokenizer(), 24, 7, 5)
    assert [len(batch["input_ids"]) for batch in batches] == [5, 5, 5, 5, 4]
    found = sorted(
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )
    assert found == sorted(make_tokenizer()(text).input_ids[:7] for text in SENTENCES)


def test_packing():
    tokenizer = make_tokenizer()
    stream = [i for text in SENTENCES for i in [*tokenizer(text).input_ids, 2]]
    batches = packed_batches([(t,) for t in SENTENCES], tokenizer, 6, 8, 4, seed=None)
    windows = torch.cat([batch["input_ids"] for batch in batches])
    assert windows.tolist() == [stream[8 * i : 8 * i + 8] for i in range(6)]
    assert all(bool(batch["attention_mask"].all()) for batch in batches)


def test_windows_of_one_long_text_are_spread_over_it():
    texts = [("\n".join(SENTENCES),)]
    first, other, again = (
        torch.cat([b["input_ids"] for b in packed_batches(texts, make_tokenizer(), 6, 8, 4, seed)])
        for seed in (None, 1, 1)
    )
    assert torch.equal(other, again) and not torch.equal(first, other)


def test_too_little_text() -> None:
    tokenizer = make_tokenizer()
    with pytest.warns(UserWarning, match="have 24 rows .* All are used"):
        (batch,) = padded_batches([(t,) for t in SENTENCES], tokenizer, 30, 7, 30)
    assert len(batch["input_ids"]) == 24
    with pytest.warns(UserWarning, match="for 2 windows of 8 tokens, fewer than num_samples=5"):
        (batch,) = packed_batches([(" ".join(SENTENCES[:4]),)], tokenizer, 5, 8, 5)
    assert batch["input_ids"].shape == (2, 8)
    with pytest.raises(ValueError, match="no row with text"):
        padded_batches([], tokenizer, 1, 7, 1)
    with pytest.raises(ValueError, match="too few for a window of 800"):
        packed_batches([(SENTENCES[0],)], tokenizer, 5, 800, 5)
