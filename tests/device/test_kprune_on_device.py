"""Every path of K-prune that moves tensors, on one device and in every precision, against the CPU."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForSequenceClassification

from kprune_ext import KPruneConfig, kprune
from kprune_ext.tuning.least_squares import NormalEquations
from tests.helpers.kprune import padded, sequences, tiny_bert
from tests.helpers.kprune_models import FAMILIES, batches_for, is_available, outputs_of, tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def on(device, batches):
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def pruned_on(device, dtype=torch.float32, **options):
    model = tiny_bert(dtype=dtype).to(device)
    config = KPruneConfig(**({"reduction": 0.5} | options))
    return kprune(model, on(device, padded(sequences())), config, progress=False)


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits.double().cpu()


def difference(one, other):
    return float((one - other).norm() / other.norm())


@each_dtype
def test_result_stays_on_the_device_and_keeps_the_budget(device, dtype):
    pruned = pruned_on(device, dtype)
    assert {p.device.type for p in pruned.parameters()} == {device.type}
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    report = pruned.kprune_report
    assert report.flops <= 0.5 * report.flops_before
    assert torch.isfinite(logits_of(pruned, on(device, padded(sequences()))[0])).all()


@each_dtype
@pytest.mark.parametrize("schedule", ["per_layer", "per_sublayer"])
def test_result_is_as_close_to_the_dense_model_as_the_cpus(device, dtype, schedule):
    dense = tiny_bert(dtype=torch.float32)
    data = padded(sequences(40))
    errors = []
    for place in (torch.device("cpu"), device):
        model = tiny_bert(dtype=dtype).to(place)
        config = KPruneConfig(reduction=0.3, schedule=schedule)
        pruned = kprune(model, on(place, data), config, progress=False)
        found = [logits_of(pruned, batch) for batch in on(place, data)]
        wanted = [logits_of(dense, batch) for batch in data]
        errors.append(difference(torch.cat(found), torch.cat(wanted)))
    assert errors[1] < errors[0] + TOLERANCE[dtype]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(device, family):
    """In float32, the same units and nearly the same outputs as on the CPU."""
    if not is_available(family):
        pytest.skip("needs a newer transformers")
    config = KPruneConfig(reduction=0.5)
    expected = kprune(tiny(family), batches_for(family), config, progress=False)
    data = on(device, batches_for(family))
    found = kprune(tiny(family).to(device), data, config, progress=False)
    kept = [[row.units for row in model.kprune_report.sublayers] for model in (found, expected)]
    if kept[0] == kept[1]:  # a near tie may fall otherwise
        for own, other in zip(
            outputs_of(found, data[0]), outputs_of(expected, batches_for(family)[0]), strict=True
        ):
            assert difference(own.double().cpu(), other.double()) < 0.05


def test_saving_and_loading(device, tmp_path):
    pruned = pruned_on(device)
    pruned.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).to(device).eval()
    batch = on(device, padded(sequences()))[0]
    assert difference(logits_of(again, batch), logits_of(pruned, batch)) < 1e-6


def test_an_offloaded_model(device):
    expected = pruned_on(device)
    model = tiny_bert()
    cpu_offload(model, device)
    found = kprune(
        model, on(device, padded(sequences())), KPruneConfig(reduction=0.5), progress=False
    )
    batch = on(device, padded(sequences()))[0]
    own = logits_of(copy.deepcopy(found).to(device), batch)
    assert difference(own, logits_of(expected, batch)) < 0.05


def test_latency_is_measured_on_the_device(device):
    """A GPU is no faster with fewer units of so small a model: only what is possible is asked for."""
    dense = tiny_bert(layers=4, hidden=64, heads=8, neurons=512).to(device)
    data = on(device, padded(sequences()))
    config = KPruneConfig(reduction=0.05, metric="latency")
    report = kprune(dense, data, config, progress=False).kprune_report
    assert report.cost <= 0.95 * report.cost_before


def test_training_goes_on(device):
    pruned = pruned_on(device).train()
    batch = on(device, padded(sequences()))[0]
    labels = torch.zeros(len(batch["input_ids"]), dtype=torch.long, device=device)
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = pruned(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_equations_of_16_bit_features_keep_their_digits(device, dtype):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5000, 60, generator=generator).to(dtype)
    targets = torch.randn(5000, 20, generator=generator).to(dtype)
    equations = NormalEquations.zeros(60, 20, device)
    equations.update(features.to(device), targets.to(device))
    exact = features.double().T @ features.double()
    assert difference(equations.gram.cpu(), exact) < 2e-5
    assert difference(equations.cross.cpu(), features.double().T @ targets.double()) < 2e-5
    assert equations.epsilon == torch.finfo(torch.float32).eps


def test_equations_do_not_round_targets_of_more_digits(device):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 30, generator=generator).bfloat16()
    targets = torch.randn(500, 20, generator=generator)
    equations = NormalEquations.zeros(30, 20, device)
    equations.update(features.to(device), targets.to(device))
    assert difference(equations.cross.cpu(), features.double().T @ targets.double()) < 1e-6
