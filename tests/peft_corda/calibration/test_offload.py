"""Models whose weights are offloaded to CPU memory or disk, and are gathered module by module."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model

from peft_corda import calibrate, initialize_corda
from peft_corda.base_model.targets import find_targets
from peft_corda.base_model.weights import dense_weight
from tests.helpers.corda import (
    bytes_of,
    logits_of,
    make_batches,
    make_config,
    make_model,
    train_steps,
)


def dispatched(model, folder):
    blocks = "transformer.h" if hasattr(model, "transformer") else "model.layers"
    front = blocks.split(".")[0]
    rest = {f"{front}.{name}": "cpu" for name, _ in getattr(model, front).named_children()}
    del rest[blocks]
    device_map = {**rest, "lm_head": "cpu", f"{blocks}.0": "cpu", f"{blocks}.1": "disk"}
    return dispatch_model(
        model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True
    )


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, torch.device("cpu"), offload_buffers=False),
    "disk": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
    "device_map": dispatched,
}


@pytest.fixture(params=OFFLOADS)
def offload(request, tmp_path):
    def apply(model):
        return OFFLOADS[request.param](model, str(tmp_path / "weights"))

    return apply


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_factors_are_those_of_the_model_in_memory(kind, method, offload):
    expected = calibrate(make_model(kind), make_config(kind, corda_method=method), make_batches())
    model = offload(make_model(kind))
    away = {name for name, p in model.named_parameters() if p.device.type == "meta"}
    assert away
    found = calibrate(model, make_config(kind, corda_method=method), make_batches())
    assert bytes_of(found) == bytes_of(expected)
    assert {name for name, p in model.named_parameters() if p.device.type == "meta"} == away


def test_several_passes_change_nothing(offload):
    expected = calibrate(make_model("llama"), make_config(), make_batches())
    found = calibrate(offload(make_model("llama")), make_config(), make_batches(), "60KB")
    assert bytes_of(found) == bytes_of(expected)


def test_adapter_starts_trains_and_reloads_on_a_model_in_memory(offload, tmp_path):
    batch = make_batches()[0]
    models = []
    for place in (lambda model: model, offload):
        model, config = place(make_model("llama")), make_config()
        before = logits_of(model, batch)
        calibrate(model, config, make_batches(), verbose=False)
        adapted = get_peft_model(model, config)
        assert torch.equal(logits_of(adapted, batch), before)
        train_steps(adapted, batch)
        assert not torch.equal(logits_of(adapted, batch), before)
        models.append(adapted)
    kept, offloaded = models
    torch.testing.assert_close(logits_of(offloaded, batch), logits_of(kept, batch))
    offloaded.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(reloaded, batch), logits_of(offloaded, batch))


def test_initialize_corda_on_an_offloaded_model(offload):
    batch, model = make_batches()[0], offload(make_model("llama"))
    before = logits_of(model, batch)
    adapted = get_peft_model(model, make_config())
    factors = initialize_corda(adapted, make_batches())
    assert bytes_of(factors) == bytes_of(
        calibrate(make_model("llama"), make_config(), make_batches())
    )
    assert torch.equal(logits_of(adapted, batch), before)


def test_checkpoint_tells_other_offloaded_weights(offload, tmp_path):
    folder = tmp_path / "checkpoint"
    calibrate(offload(make_model("llama")), make_config(), make_batches(), checkpoint_dir=folder)
    other = make_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="model's weights differ"):
        calibrate(other, make_config(), make_batches(), checkpoint_dir=folder)


def test_weights_that_are_nowhere_are_refused():
    with torch.device("meta"):
        model = make_model("llama")
    name, module = next(iter(find_targets(model, make_config()).items()))
    with pytest.raises(ValueError, match=f"The weight of {name} is not in memory"):
        dense_weight(name, module)
