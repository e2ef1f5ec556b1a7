"""Batches are calibrated on as the model, or the user's `predict`, would run on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding, DynamicCache

from kprune_ext.samples.choice import sample_keys
from kprune_ext.samples.samples import collect_samples
from tests.helpers.kprune import assert_same_state, padded, run, sequences, state_of, tiny_bert
from tests.helpers.kprune_models import outputs_of, tiny

Batch = dict[str, Any]


def large_images() -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [{"pixel_values": torch.randn(4, 3, 24, 24, generator=generator)} for _ in range(3)]


def full(count: int = 4) -> list[Batch]:
    """Batches without padding."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 60, (count, 4, 9), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


def same_weights(one: Any, other: Any) -> bool:
    states = one.state_dict(), other.state_dict()
    if states[0].keys() != states[1].keys():
        return False
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def close_weights(one: Any, other: Any) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_images_of_another_size(family: str) -> None:
    """As a flag, as a tensor without dimensions, and inside the user's `predict`."""
    option: dict[str, Any] = {} if family == "dinov2" else {"interpolate_pos_encoding": True}
    data = large_images()
    found = [run(tiny(family), [{**batch, **option} for batch in data])]
    tensors = {name: torch.tensor(value) for name, value in option.items()}
    found.append(run(tiny(family), [{**batch, **tensors} for batch in data]))
    found.append(run(tiny(family), data, predict=lambda m, b: m(**b, **option).logits))
    assert found[0].kprune_report.samples == 12
    assert found[0].kprune_report.tokens == 12 * 37
    assert same_weights(found[0], found[1])
    logits = [model(**data[0], **option).logits for model in (found[0], found[2])]
    torch.testing.assert_close(*logits)


def test_positions_for_all_rows_at_once() -> None:
    model, data = tiny_bert(), full()
    usual = run(model, data)
    positions = torch.arange(9).unsqueeze(0)
    assert same_weights(usual, run(model, [{**b, "position_ids": positions} for b in data]))
    # Two batches of one row, whose positions could be their own.
    ends = [{name: value[:1] for name, value in batch.items()} for batch in data[:2]]
    usual = run(model, data + ends)
    given = [{**b, "position_ids": positions} for b in data + ends]
    assert same_weights(usual, run(model, given))


def test_positions_of_padded_batches() -> None:
    """Padding stays where positions belong to no row, and makes no difference."""
    model, data = tiny_bert(), padded(sequences())
    given = [{**b, "position_ids": torch.arange(b["input_ids"].shape[1])[None]} for b in data]
    batch = data[0]
    usual, other = run(model, data), run(model, given)
    assert [row.units for row in usual.kprune_report.sublayers] == [
        row.units for row in other.kprune_report.sublayers
    ]
    torch.testing.assert_close(usual(**batch).logits, other(**batch).logits, rtol=1e-3, atol=1e-3)


def test_columns_that_only_predict_reads() -> None:
    model, data = tiny_bert(), padded(sequences())
    weight = torch.tensor([1.0, 2.0, 0.5])
    seen: list[set[str]] = []

    def predict(model: Any, batch: Any) -> Tensor:
        seen.append(set(batch))
        rows = len(batch["input_ids"])
        assert len(batch["strength"]) == len(batch["names"]) == rows
        assert batch["names"] == [f"n{number}" for number in batch["numbers"].tolist()]
        assert batch["weight"].shape == (3,) and batch["task"] == "a task"
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**inputs).logits * batch["weight"] * batch["strength"].unsqueeze(1)

    given, start = [], 0
    for batch in data:
        numbers = torch.arange(start, start + len(batch["input_ids"]))
        extra = {"numbers": numbers, "names": [f"n{n}" for n in numbers.tolist()]}
        extra |= {"strength": np.ones(len(numbers), "float32"), "labels": numbers % 3}
        given.append({**batch, **extra, "weight": weight, "task": "a task"})
        start += len(numbers)
    found = run(model, given, predict=predict)
    names = set(data[0]) | {"numbers", "names", "strength", "labels", "weight", "task"}
    assert all(one == names for one in seen)
    plain = run(model, data, predict=lambda m, b: m(**b).logits * weight)
    assert same_weights(found, plain)


def test_what_belongs_to_no_row_is_told_from_several_batches() -> None:
    """Class weights as long as one batch has rows, or as all batches have."""
    data = full(2)
    short = {name: value[:3] for name, value in data[1].items()}
    for batches, size in (([*data, short], 3), (data, 4)):
        weight = torch.rand(size)
        given = [{**batch, "class_weights": weight} for batch in batches]
        samples = collect_samples(tiny_bert(), given, 10**6, runs=lambda inputs: None)
        for sample in samples:
            assert torch.equal(sample.inputs["class_weights"], weight)


def test_a_batch_encoding_is_read_as_one() -> None:
    model, data = tiny_bert(), [BatchEncoding(batch) for batch in full()]

    def predict(model: Any, batch: Any) -> Tensor:
        batch = batch.to(model.device)
        assert getattr(batch, "nothing", None) is None
        return model(batch.input_ids, batch.attention_mask).logits

    assert same_weights(run(model, data), run(model, data, predict=predict))


def test_predict_may_change_its_batch_but_not_the_users() -> None:
    model, data = tiny_bert(), [{**b, "labels": torch.zeros(4).long()} for b in full(2)]
    before = [{name: value.clone() for name, value in batch.items()} for batch in data]
    state = state_of(model)

    def predict(model: Any, batch: Any) -> Tensor:
        batch.pop("labels")
        batch["input_ids"][:, 0] = 4
        batch["attention_mask"].fill_(1)
        return model(**batch).logits

    run(model, data, predict=predict)
    assert_same_state(state, state_of(model))
    for one, other in zip(data, before, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "extra", [{"labels": torch.full((4,), -1)}, {"idx": torch.arange(4)}, {"texts": ["a"] * 4}]
)
def test_a_predict_that_cannot_take_all_entries(extra: Batch, caplog) -> None:
    """As before, labels out of range and columns that the model does not know do no harm."""
    model, data = tiny("distilbert"), full()

    def strict(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Tensor:
        return model(input_ids, attention_mask, labels=labels).logits

    predict = lambda m, b: strict(m, **b)  # noqa: E731
    usual = run(model, data, predict=predict)
    assert same_weights(usual, run(model, [{**b, **extra} for b in data], predict=predict))
    assert f"{next(iter(extra))} are left out" in caplog.text
    with pytest.raises(KeyError, match="nothing"):
        run(model, data, predict=lambda m, b: m(b["nothing"]).logits)
    with pytest.raises(ValueError, match="runs none of the layers|did not run the layers"):
        run(model, data, predict=lambda m, b: torch.zeros(len(b["input_ids"]), 2))
    with pytest.raises(ValueError, match="Each token needs one"):
        run(model, data, predict=lambda m, b: m(b["input_ids"][:, 2:]).logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32])
def test_a_masks_dtype_makes_no_difference(dtype: torch.dtype) -> None:
    model, data = tiny_bert(), padded(sequences())
    given = [{**b, "attention_mask": b["attention_mask"].to(dtype)} for b in data]
    keys = [sample_keys(collect_samples(model, d, 10**6), 3) for d in (data, given)]
    assert keys[0] == keys[1]
    assert same_weights(run(model, data), run(model, given))


def test_arrays_and_reused_memory() -> None:
    model, data = tiny_bert(), padded(sequences())
    usual = run(model, data)
    arrays = [{name: value.numpy() for name, value in batch.items()} for batch in data]
    assert same_weights(usual, run(model, arrays))
    plain = full()

    def reused() -> Any:
        memory = {name: torch.empty_like(value) for name, value in plain[0].items()}
        for batch in plain:
            for name, value in batch.items():
                memory[name].copy_(value)
            yield memory

    assert same_weights(run(model, plain), run(model, reused()))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_empty_batches_are_skipped(family: str) -> None:
    data = full() if family == "bert" else [{"pixel_values": torch.randn(4, 3, 16, 16)}]
    nothing = [
        {},
        {name: value[:0] for name, value in data[0].items()},
        {name: torch.empty(0) for name in data[0]},
        {name: [] for name in data[0]},
    ]
    usual = run(tiny(family), data)
    assert same_weights(usual, run(tiny(family), [*nothing, *data, *nothing]))
    with pytest.raises(ValueError, match="or there is no input, in 4 batches"):
        run(tiny(family), nothing)


def test_what_only_changes_the_outputs_is_left_out() -> None:
    model, data = tiny("bert"), full()
    usual = run(model, data)
    options = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    assert same_weights(usual, run(model, [{**b, **options, "use_cache": True} for b in data]))
    predict = lambda m, b: m(**b)[0]  # noqa: E731
    other = run(model, [{**b, "return_dict": False} for b in data], predict=predict)
    for one, two in zip(outputs_of(usual, data[0]), outputs_of(other, data[0]), strict=True):
        torch.testing.assert_close(one, two)


IDS = torch.ones(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": IDS, "attention_mask": IDS[:, :3]}, "attention_mask has shape"),
        ({"input_ids": IDS, "attention_mask": IDS[:1]}, "attention_mask has shape"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 5, 5)}, "attention_mask has shape"),
        ({"input_ids": IDS, "attention_mask": (IDS - 1.0) * 1e9 - 1}, "negative values or NaN"),
        ({"input_ids": IDS, "attention_mask": IDS * float("nan")}, "negative values or NaN"),
        ({"input_ids": IDS.unsqueeze(1)}, r"of shape \(batch, tokens\)"),
        ({"inputs_embeds": torch.ones(2, 5)}, r"of shape \(batch, tokens, hidden\)"),
    ],
)
def test_batches_that_are_refused(batch: Batch, message: str) -> None:
    for predict in (None, lambda m, b: m(**b).logits):
        with pytest.raises(ValueError, match=message):
            run(tiny_bert(), [batch], predict=predict)


def test_a_cache_is_left_as_it_is() -> None:
    cache = DynamicCache()
    model = tiny("bert", "embeddings")
    with pytest.raises(ValueError, match="'past_key_values', a cache that the model would"):
        run(model, [{**batch, "past_key_values": cache} for batch in full()])
    predict = lambda m, b: m(b["input_ids"], past_key_values=b["memory"]).logits  # noqa: E731
    with pytest.raises(ValueError, match="'memory', a cache"):
        run(tiny_bert(), [{**batch, "memory": cache} for batch in full()], predict=predict)
    assert cache.get_seq_length() == 0


def test_samples_that_only_predict_tells_apart_have_keys_of_their_own() -> None:
    batch = {"input_ids": IDS, "turn": torch.tensor([0, 1])}
    samples = collect_samples(tiny_bert(), [batch], 100, runs=lambda inputs: None)
    assert len(set(sample_keys(samples, 0))) == 2
    plain = collect_samples(tiny_bert(), [{"input_ids": IDS}], 100)
    assert len(set(sample_keys(plain, 0))) == 1
    assert sample_keys(samples[:1], 0) == sample_keys(plain[:1], 0)
