"""Plans of pruning runs, against what the runs do."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kprune_ext import KPruneConfig, kprune
from kprune_ext.planning import plan_pruning
from tests.helpers.kprune import tiny_bert
from tests.helpers.kprune_decoders import equal_texts, tiny_decoder


def wide(**options):
    return tiny_decoder("llama", hidden_size=96, head_dim=16, intermediate_size=400, **options)


def test_a_plan_needs_no_weights() -> None:
    config = KPruneConfig(reduction=0.3, max_tokens=5000)
    with torch.device("meta"):
        empty = type(wide())(wide().config)
    assert plan_pruning(empty, config, length=32) == plan_pruning(wide(), config, length=32)


def test_parts_of_a_plan() -> None:
    model = wide()
    plan = plan_pruning(model, KPruneConfig(reduction=0.3, max_tokens=6400), length=32)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert plan.weights == 4 * model.num_parameters() + buffers
    layers = sum(p.numel() for p in model.model.layers.parameters())
    assert plan.copy == pytest.approx(plan.weights - 0.3 * 4 * layers, abs=1)
    working = max(plan.measuring, plan.copy - plan.rest + plan.tuning)
    assert plan.beyond_model == plan.states + max(working, plan.copy)
    assert plan.states == 2 * 4 * 96 * 6400 and plan.spilled == 0
    assert (plan.tokens, plan.scored_tokens) == (6400, 3200)
    assert plan.passes == pytest.approx(3 * 0.5 + 1 + 2 * 0.7)
    small = KPruneConfig(reduction=0.3, max_tokens=6400, max_state_memory=1000)
    spilling = plan_pruning(model, small, length=32)
    assert (spilling.states, spilling.spilled) == (1000, plan.states - 1000)
    assert "temporary files" in str(spilling) and "temporary files" not in str(plan)
    half = plan_pruning(wide(dtype=torch.bfloat16), small, length=32)
    assert half.weights < 0.51 * plan.weights


def test_knowledge_measured_again_comes_beside_what_is_pruned() -> None:
    once, again = (
        plan_pruning(wide(), KPruneConfig(reduction=0.3, schedule=schedule))
        for schedule in ("once", "per_layer")
    )
    assert again.measuring == once.measuring + once.copy - once.rest


def test_several_devices() -> None:
    model, config = wide(num_hidden_layers=2), KPruneConfig(reduction=0.3, max_tokens=6400)
    places = {"model.embed_tokens": 0, "lm_head": 0, "model.layers.0": 0, "model": "cuda:1"}
    one = plan_pruning(model, config, length=32, device="cuda")
    plan = plan_pruning(model, config, length=32, device="cuda", device_map=places)
    assert list(plan.devices) == ["cuda:0", "cuda:1"] and one.devices == {}
    inside = 4 * sum(p.numel() for p in model.model.layers[1].parameters())
    own = 4 * model.model.norm.weight.numel() + inside
    growth = max(plan.measuring, round(own * plan.copy / plan.weights) + plan.tuning)
    assert plan.devices["cuda:1"] == own + growth
    assert plan.devices["cuda:0"] > plan.states + plan.weights - own
    assert all(peak < one.peak for peak in plan.devices.values())
    assert "on cuda:1" in str(plan) and "on cuda" not in str(one)
    spilled = plan_pruning(model, config, length=32, device_map=places | {"model": "disk"})
    assert spilled.devices["disk"] == own


def test_depth_adds_the_copy_and_states_alone() -> None:
    config = KPruneConfig(reduction=0.3, max_tokens=6400)
    few, many = (plan_pruning(wide(num_hidden_layers=n), config, length=32) for n in (2, 30))
    assert few.tuning == many.tuning and few.states == many.states


class Counted(TorchDispatchMode):
    """Counts the FLOPs of matrix products, backward passes included."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=found)
        return found


def test_flops_are_those_of_a_run() -> None:
    model = wide(attn_implementation="eager")
    # What the measured speed takes depends on the machine, and no plan counts it.
    config = KPruneConfig(
        reduction=0.3, held_out=0.0, ridge=1.0, score_fraction=1.0, measure_speed=False
    )
    with Counted() as counted:
        kprune(model, [equal_texts(64, 32)], config, progress=False)
    planned = plan_pruning(
        model, KPruneConfig(**(config.to_dict() | {"max_tokens": 2048})), length=32
    )
    assert planned.flops == pytest.approx(counted.total, rel=0.15)


@pytest.mark.parametrize("schedule", ["per_layer", "per_sublayer"])
def test_measuring_again_takes_more_passes(schedule) -> None:
    once, more = (
        plan_pruning(wide(), KPruneConfig(reduction=0.3, schedule=s)) for s in ("once", schedule)
    )
    assert more.passes > once.passes and more.flops > once.flops


def test_what_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match="Plans are made for decoders"):
        plan_pruning(tiny_bert())
    with pytest.raises(ValueError, match="cannot be reached"):
        plan_pruning(wide(), KPruneConfig(reduction=0.99999))
    with pytest.raises(ValueError, match="no number of tokens"):
        plan_pruning(wide(), length=0)
