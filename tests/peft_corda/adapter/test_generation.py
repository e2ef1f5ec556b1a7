"""`generate` with CORDA adapters: one, several in a batch, merged, and with a cache or without."""

import pytest
import torch
from peft import get_peft_model

from peft_corda import calibrate
from tests.helpers.corda import make_batches, make_config, make_model, train_steps

BATCH = make_batches()[0]
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def trained(kind):
    """Two adapters, trained so much that their generated texts differ."""
    model = make_model(kind)
    config = make_config(kind)
    calibrate(model, config, make_batches())
    model = get_peft_model(model, config, adapter_name="first")
    other = make_config(kind, corda_method="ipm", r=4)
    calibrate(model.get_base_model(), other, make_batches())
    model.add_adapter("second", other)
    for name, seed in (("first", 5), ("second", 9)):
        model.set_adapter(name)
        train_steps(model, make_batches(seed=seed)[0], steps=20, rate=0.05)
    return model.eval()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return trained(request.param)


def generated(model, **options):
    return model.generate(**BATCH, **SETTINGS, **options)


def test_adapters_change_what_is_generated(model):
    model.set_adapter("first")
    first = generated(model)
    with model.disable_adapter():
        base = generated(model)
    model.set_adapter("second")
    assert not torch.equal(first, base) and not torch.equal(first, generated(model))


def test_with_and_without_a_cache(model):
    model.set_adapter("first")
    assert torch.equal(generated(model), generated(model, use_cache=False))


def test_positional_inputs(model):
    model.set_adapter("first")
    assert torch.equal(model.generate(BATCH["input_ids"], **SETTINGS), generated(model))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_batch_with_an_adapter_for_each_row(model, beams):
    names = ["first", "__base__", "second", "first"]
    mixed = generated(model, adapter_names=names, num_beams=beams)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = generated(model, num_beams=beams)
        else:
            model.set_adapter(name)
            alone = generated(model, num_beams=beams)
        width = min(mixed.shape[1], alone.shape[1])
        assert torch.equal(mixed[row, :width], alone[row, :width]), name


def test_merged(model):
    model.set_adapter("first")
    expected = generated(model)
    model.merge_adapter()
    try:
        assert torch.equal(generated(model), expected)
    finally:
        model.unmerge_adapter()


def test_in_bfloat16():
    model = trained("llama").to(torch.bfloat16)
    model.set_adapter("first")
    assert generated(model).shape[0] == len(BATCH["input_ids"])
