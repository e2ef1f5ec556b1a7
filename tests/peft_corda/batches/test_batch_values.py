"""Batches of arrays, empty batches, and masks and tokens of a wrong shape."""

import numpy as np
import pytest
import torch
import transformers

from peft_corda import calibrate
from tests.helpers.corda import bytes_of, make_batches, make_config, make_model, padded_batches

KINDS = ["llama", "gpt2", "bert"]


def factors_for(kind, batches, **options):
    return calibrate(make_model(kind), make_config(kind, r=2), batches, progress=False, **options)


@pytest.mark.parametrize(
    "convert", [lambda t: t.numpy(), lambda t: t.int().numpy(), torch.Tensor.tolist]
)
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_and_lists_are_as_good_as_tensors(kind, convert):
    batches = padded_batches()
    arrays = [{key: convert(value) for key, value in batch.items()} for batch in batches]
    assert bytes_of(factors_for(kind, arrays)) == bytes_of(factors_for(kind, batches))


def test_arrays_of_numbers_are_known_to_a_checkpoint(tmp_path):
    arrays = [{key: value.numpy() for key, value in batch.items()} for batch in make_batches()]
    factors_for("llama", arrays, checkpoint_dir=tmp_path)
    other = [{key: value[::-1].copy() for key, value in batch.items()} for batch in arrays]
    with pytest.raises(ValueError, match="first batch of the data"):
        factors_for("llama", other, checkpoint_dir=tmp_path)


def test_arrays_of_pixels_are_of_the_precision_of_models():
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    model = transformers.ViTForImageClassification(config).eval()
    config = make_config("bert", r=2, task_type=None, exclude_modules=["classifier"])
    batch = {"pixel_values": np.random.default_rng(0).normal(size=(2, 3, 16, 16))}
    assert calibrate(model, config, [batch], progress=False).tokens == 10


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_are_skipped(kind):
    batches = padded_batches()
    no_row = {key: value[:0] for key, value in batches[0].items()}
    no_token = {key: value[:, :0] for key, value in batches[0].items()}
    among = [{}, no_row, batches[0], no_token, *batches[1:], {}, no_row]
    assert bytes_of(factors_for(kind, among)) == bytes_of(factors_for(kind, batches))
    assert bytes_of(factors_for(kind, among, max_memory=2**18)) == bytes_of(
        factors_for(kind, batches, max_memory=2**18)
    )


def test_nothing_but_empty_batches():
    with pytest.raises(ValueError, match="no token that counts: each of the 2 batches is empty"):
        factors_for("llama", [{}, {"input_ids": torch.zeros(0, 3).long()}])


def test_first_batch_of_padding_alone():
    first, second = make_batches(2)
    first["attention_mask"] = torch.zeros_like(first["attention_mask"])
    assert factors_for("llama", [first, second]).tokens == 48


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 7), (4, 20), (3, 12), (12,), (4, 12, 12), (4, 1, 1, 12)])
def test_mask_that_does_not_fit(kind, shape):
    """Said before the work, whichever batch it is in; some models would take it as it is."""
    batches = make_batches()
    batches[2]["attention_mask"] = torch.ones(shape, dtype=torch.long)
    model = make_model(kind)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=r"attention_mask.* must have shape"):
        calibrate(model, make_config(kind, r=2), batches, progress=False)


def test_one_row_of_a_mask_for_all():
    batches, one = make_batches(1), make_batches(1)
    batches[0]["attention_mask"][:, 9:] = 0
    one[0]["attention_mask"] = batches[0]["attention_mask"][:1]
    assert bytes_of(factors_for("llama", one)) == bytes_of(factors_for("llama", batches))


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("change", [lambda ids: ids[0], lambda ids: ids[None]], ids=["1", "3"])
def test_tokens_of_other_dimensions(kind, change):
    """Llama runs on three without an error, and takes the batch for the tokens."""
    batches = [{"input_ids": change(batch["input_ids"])} for batch in make_batches()]
    with pytest.raises(ValueError, match=r"input_ids of shape .*\(batch, tokens\)"):
        factors_for(kind, batches)
    with pytest.raises(ValueError, match=r"input_ids of shape .*\(batch, tokens\)"):
        factors_for(kind, make_batches() + batches)


def test_tokens_of_three_dimensions_that_a_model_arranges_itself():
    batches = [{"input_ids": batch["input_ids"]} for batch in make_batches()]
    stacked = [{"input_ids": batch["input_ids"][None]} for batch in batches]
    assert bytes_of(factors_for("gpt2", stacked)) == bytes_of(factors_for("gpt2", batches))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([[3, 4], [5]], ValueError, "rows of input_ids in calibration batch 1 differ in length"),
        (np.array([["a"]]), TypeError, "input_ids of calibration batch 1 is an array of"),
        (np.array([[None]]), TypeError, "input_ids of calibration batch 1 is an array of object"),
    ],
)
def test_values_that_are_no_numbers(values, error, message):
    with pytest.raises(error, match=message):
        factors_for("llama", [*make_batches(1), {"input_ids": values}])
