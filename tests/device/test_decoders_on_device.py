"""Pruning of decoders on one device and in every precision, and what is done with the result."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kprune_ext import KPruneConfig, kprune
from tests.helpers.kprune_decoders import DECODERS, decoder_batches, tiny_decoder

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def on(device, batches):
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def pruned_on(device, family="llama", dtype=torch.float32, **options):
    model = tiny_decoder(family, dtype=dtype).to(device)
    config = KPruneConfig(**({"reduction": 0.3} | options))
    return model, kprune(model, on(device, decoder_batches(40)), config, progress=False)


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits.double().cpu()[batch["attention_mask"].bool().cpu()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["free", "uniform"])
def test_result_stays_on_the_device_and_keeps_the_budget(device, dtype, layout):
    model, pruned = pruned_on(device, dtype=dtype, layout=layout)
    assert {p.device.type for p in pruned.parameters()} == {device.type}
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    report = pruned.kprune_report
    assert report.cost <= 0.7 * report.cost_before
    batch = on(device, decoder_batches(4))[0]
    assert torch.isfinite(logits_of(pruned, batch)).all()
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_result_is_as_close_to_the_dense_model_as_the_cpus(device, family):
    errors = []
    for place in (torch.device("cpu"), device):
        model, pruned = pruned_on(place, family)
        batch = on(place, decoder_batches(8, batch=8))[0]
        wanted = logits_of(model, batch)
        errors.append(float((logits_of(pruned, batch) - wanted).norm() / wanted.norm()))
    assert (
        errors[1] < errors[0] + 0.02
    )  # draws may fall otherwise where probabilities are near ties


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_and_without_a_cache(device, family):
    _, pruned = pruned_on(device, family, reduction=0.5)
    batch = on(device, decoder_batches(4))[0]
    one, other = (pruned.generate(**batch, **OPTIONS, use_cache=use) for use in (True, False))
    assert torch.equal(one, other)


def test_saving_and_loading(device, tmp_path):
    _, pruned = pruned_on(device)
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).to(device).eval()
    batch = on(device, decoder_batches(4))[0]
    assert (logits_of(again, batch) - logits_of(pruned, batch)).abs().max() < 1e-5
