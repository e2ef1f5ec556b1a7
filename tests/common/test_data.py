"""Calibration data in the forms that people have them in."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from kprune_ext.common.data import Encoding, as_batches, sequence_length
from tests.helpers.text import SENTENCES, make_tokenizer

TEXTS = SENTENCES[:5]


def make():
    made = make_tokenizer()
    made.pad_token = made.eos_token
    made.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return make()


def ids(batches):
    """The unmasked tokens of every row."""
    return [
        row[mask.bool()].tolist()
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def forms(tokenizer):
    plain = tokenizer(TEXTS)
    return {
        "list": TEXTS,
        "tuple": tuple(TEXTS),
        "array": np.array(TEXTS),
        "iterator": iter(TEXTS),
        "generator": (text for text in TEXTS),
        "column": Dataset.from_dict({"text": TEXTS})["text"],
        "texts": Dataset.from_dict({"text": TEXTS, "label": [0] * 5}),
        "one column": Dataset.from_dict({"body": TEXTS, "id": list(range(5))}),
        "stream": Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
        "rows": [{"text": text} for text in TEXTS],
        "columns": {"text": TEXTS},
        "tokens": list(plain.input_ids),
        "tensors of tokens": [torch.tensor(row) for row in plain.input_ids],
        "tokenised": Dataset.from_dict(dict(plain)),
        "tensors": Dataset.from_dict(dict(plain)).with_format("torch"),
        "encoding": plain,
        "padded": [tokenizer.pad(plain, return_tensors="pt")],
        "loader": DataLoader(TEXTS, batch_size=2),
        "loader of rows": DataLoader(Dataset.from_dict({"text": TEXTS})["text"], batch_size=2),
    }


@pytest.mark.parametrize("form", [*forms(make())])
def test_every_form_gives_the_same_tokens(form, tokenizer) -> None:
    data = forms(tokenizer)[form]
    batches = list(as_batches(data, Encoding(tokenizer, batch_size=2)))
    assert ids(batches) == tokenizer(TEXTS).input_ids
    assert all(isinstance(value, torch.Tensor) for batch in batches for value in batch.values())


def test_texts_can_be_read_again(tokenizer) -> None:
    batches = as_batches(TEXTS, Encoding(tokenizer, batch_size=2))
    assert ids(batches) == ids(batches) and len(list(batches)) == 3


def test_processes_take_turns_at_examples(tokenizer) -> None:
    parts = [ids(as_batches(TEXTS, Encoding(tokenizer), part=(n, 2))) for n in range(2)]
    every = tokenizer(TEXTS).input_ids
    assert parts == [every[::2], every[1::2]]


BATCH = {"input_ids": torch.ones(2, 3, dtype=torch.long)}


@pytest.mark.parametrize(
    "data",
    [
        [BATCH, BATCH],
        [{"x": torch.ones(2, 3), "flag": True}],
        [{"pixel_values": torch.ones(2, 3, 4, 4)}],
        [],
        DataLoader([{"input_ids": torch.ones(3)}]),
    ],
)
def test_batches_are_left_as_they_are(data) -> None:
    assert as_batches(data, Encoding(None)) is data


def test_one_batch_and_an_iterator_of_batches() -> None:
    assert as_batches(BATCH, Encoding(None)) == [BATCH]
    assert list(as_batches(iter([BATCH, BATCH]), Encoding(None))) == [BATCH, BATCH]
    (one,) = as_batches(BatchEncoding({"input_ids": [3, 4]}), Encoding(None))
    assert one["input_ids"].tolist() == [[3, 4]]


def test_pairs(tokenizer) -> None:
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])]
    expected = [tokenizer(*pair).input_ids for pair in pairs]
    for data in (
        pairs,
        [list(pair) for pair in pairs],
        DataLoader(pairs, batch_size=2),
        DataLoader(pairs, batch_size=2, collate_fn=list),
        [{"sentence1": a, "sentence2": b, "label": 1} for a, b in pairs],
        [{"question": a, "answer": [b, "another"]} for a, b in pairs],
    ):
        assert ids(as_batches(data, Encoding(tokenizer))) == expected


def test_language_models_predict_answers_alone(tokenizer) -> None:
    row = {"prompt": "w1 w2", "completion": "w3"}
    (batch,) = as_batches([row, ("w1", "w2 w3")], Encoding(tokenizer, model="decoder"))
    numbers = [tokenizer(text).input_ids for text in ("w1 w2", "w3", "w1", "w2 w3")]
    end = tokenizer.eos_token_id
    assert batch["input_ids"].tolist() == [
        [*numbers[0], *numbers[1], end],
        [*numbers[2], *numbers[3], end],
    ]
    assert batch["labels"].tolist() == [[-100, -100, *numbers[1], end], [-100, *numbers[3], end]]


def test_texts_among_answers_count_as_a_whole(tokenizer) -> None:
    data = ["w4 w5 w6", {"prompt": "w1 w2", "completion": "w3"}]
    for given in (data, data[::-1]):
        (batch,) = as_batches(given, Encoding(tokenizer, model="decoder"))
        labels = [row[row != -100].tolist() for row in batch["labels"]]
        expected = [tokenizer("w4 w5 w6").input_ids]
        expected.append([*tokenizer("w3").input_ids, tokenizer.eos_token_id])
        assert labels == (expected if given is data else expected[::-1])


def test_texts_among_tokens_are_not_left_out(tokenizer) -> None:
    def collate(group):
        raise TypeError(f"{len(group)} examples of different kinds")

    with pytest.raises(TypeError, match="2 examples"):
        list(as_batches([[3, 4], "w1"], Encoding(tokenizer), collate=collate))


def test_encoder_decoders_get_labels_and_no_single_texts(tokenizer) -> None:
    how = Encoding(tokenizer, model="encoder_decoder")
    (batch,) = as_batches([("w1 w2", "w3")], how)
    assert batch["labels"].tolist() == [tokenizer("w3").input_ids]
    with pytest.raises(ValueError, match="two texts"):
        list(as_batches(["w1 w2"], how))


@pytest.mark.parametrize("column", ["messages", "conversations", None])
def test_chats(column, tokenizer) -> None:
    chat = [{"role": "w1", "content": "w2"}, {"role": "w3", "content": "w4"}]
    data = [chat] if column is None else [{column: chat}]
    for model in ("encoder", "decoder"):
        found = ids(as_batches(data, Encoding(tokenizer, model=model)))
        assert found == [tokenizer("w1 w2 w3 w4").input_ids]
    asked = [{"prompt": chat[:1], "completion": chat[1:]}]
    (batch,) = as_batches(asked, Encoding(tokenizer, model="decoder"))
    assert batch["labels"].tolist() == [[-100, -100, *tokenizer("w3 w4").input_ids]]
    with pytest.raises(ValueError, match="no chat template"):
        list(as_batches(data, Encoding(make_tokenizer())))


def test_long_texts(tokenizer) -> None:
    text = " ".join(SENTENCES)
    whole = tokenizer(text).input_ids
    assert ids(as_batches([text], Encoding(tokenizer, 10))) == [whole[:10]]
    parts = ids(as_batches([text], Encoding(tokenizer, 10, model="decoder")))
    assert list(chain.from_iterable(parts)) == whole and max(map(len, parts)) == 10


def test_rows_of_tokens_are_padded() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    (batch,) = as_batches(rows, Encoding(None))
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    images = [{"pixel_values": torch.ones(3, 4, 4), "label": 1}] * 3
    (batch,) = as_batches(images, Encoding(None))
    assert batch["pixel_values"].shape == (3, 3, 4, 4) and batch["label"].shape == (3,)


def test_blank_texts_are_left_out(tokenizer) -> None:
    assert len(ids(as_batches(["", " ", TEXTS[0]], Encoding(tokenizer)))) == 1


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("a text", TypeError, "single str"),
        (TEXTS, ValueError, "Pass tokenizer="),
        ([{"a": "x", "b": "y"}], TypeError, "cannot be told which is the text"),
        ({"a": 1}, TypeError, "neither a batch"),
        (["a text", 3], TypeError, "Cannot tell what an example of type int"),
        ([{"pixel_values": torch.ones(3, 4, n)} for n in (4, 5)], ValueError, "do not fit"),
    ],
)
def test_errors(data, error, message) -> None:
    with pytest.raises(error, match=message):
        how = Encoding(make() if "int" in message else None)
        list(as_batches(data, how))


def test_length_of_sequences(tokenizer) -> None:
    class Config:
        max_position_embeddings = 64

    assert sequence_length(None, None, None) == 512
    assert sequence_length(Config, None, None) == sequence_length(Config, None, 100) == 64
    assert sequence_length(Config, tokenizer, 16) == 16
    for wrong in (1, True, 2.5, "10"):
        with pytest.raises(ValueError, match="max_length"):
            sequence_length(None, None, wrong)
