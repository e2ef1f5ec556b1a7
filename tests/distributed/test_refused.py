"""Models whose weights are spread in ways that are not supported; each is told so."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from kprune_ext import kprune
from peft_corda import calibrate
from tests.helpers.corda import make_batches, make_config, make_model
from tests.helpers.kprune import padded, sequences, tiny_bert

BATCHES = make_batches()


@pytest.fixture(autouse=True)
def one_process(tmp_path):
    """A group of this process alone."""
    store = f"file://{tmp_path / 'meeting'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def split(linear):
    mesh = init_device_mesh("cpu", (1,))
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))


def without_hooks(model):
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tensor_parallel_weights():
    model = make_model("llama")
    split(model.model.layers[1].mlp.up_proj)
    with pytest.raises(
        ValueError, match=r"(?i)layers\.1\.mlp\.up_proj.*tensor.parallel|tensor.parallel"
    ):
        calibrate(model, make_config(), BATCHES, verbose=False)
    assert without_hooks(model)


def test_fsdp1():
    model = FullyShardedDataParallel(make_model("llama"), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
        calibrate(model, make_config(), BATCHES, verbose=False)


@pytest.mark.parametrize("kind", ["sharded", "meta"])
def test_pruning_needs_whole_weights(kind):
    model = tiny_bert()
    if kind == "sharded":
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    else:
        model.classifier.to("meta")
    with pytest.raises(
        ValueError, match=r"sharded.*needs all weights|weight is on the meta device"
    ):
        kprune(model, padded(sequences()), progress=False)
