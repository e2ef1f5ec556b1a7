"""No operation mixes devices, seen without a GPU: on a device that is only pretended."""

import pytest
import torch

from benchmarks.kprune import decoder_runs
from kprune_ext import KPruneConfig, kprune
from tests.helpers.kprune import padded, sequences, tiny_bert
from tests.helpers.kprune_decoders import decoder_batches, tiny_decoder
from tests.helpers.pretend_devices import PretendDevices

ELSEWHERE = torch.device("cuda", 0)


@pytest.fixture
def there(monkeypatch):
    """Puts models and batches on the pretended device."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**24, 2**24))
    for name in ("memory_reserved", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: 0)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with PretendDevices() as devices:
        yield (
            lambda thing: (
                thing.to(ELSEWHERE)
                if not isinstance(thing, dict)
                else {name: value.to(ELSEWHERE) for name, value in thing.items()}
            )
        )
        assert devices.moves


def test_an_encoder(there):
    data = [there(batch) for batch in padded(sequences())]
    kprune(there(tiny_bert()), data, KPruneConfig(reduction=0.5), progress=False)


@pytest.mark.parametrize("method", decoder_runs.METHODS)
def test_every_method_of_the_decoder_study(there, method):
    model = there(tiny_decoder("llama"))
    data = [there(batch) for batch in decoder_batches(40)]
    run = {"method": method, "reduction": 0.3, "tokens": 400, "seed": 0}
    pruned, masks = decoder_runs.prune(model, data, run)
    assert decoder_runs.sizes(model, pruned, masks)["params_kept"] < 0.71
