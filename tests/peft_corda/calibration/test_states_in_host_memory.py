"""Hidden states of a model on an accelerator are kept in host memory, outside the limit."""

from types import SimpleNamespace

import psutil
import pytest

from kprune_ext.common.processes import Processes
from peft_corda import calibrate
from peft_corda.base_model.forward import Runner
from peft_corda.base_model.input_groups import discover
from peft_corda.base_model.targets import find_targets
from peft_corda.planning import plan as planning
from tests.helpers.corda import bytes_of, deep_model, make_batches, make_config


def plan():
    """The plan with room for the largest covariance alone."""
    model, config, batches = deep_model("llama"), make_config(), make_batches()
    runner = Runner(model, find_targets(model, config))
    groups = discover(runner, batches[0]).groups
    largest = max(group.bytes() for group in groups)
    return planning.make_plan(runner, batches, batches[0], groups, largest, 4, Processes())


@pytest.fixture
def on_an_accelerator(monkeypatch):
    """The plan goes by an accelerator, whatever the device is."""
    monkeypatch.setattr(planning, "_is_in_host_memory", lambda runner: True)


def test_on_the_cpu_they_count():
    assert plan().cache is None


def test_on_an_accelerator_the_limit_is_for_the_statistics_alone(on_an_accelerator):
    assert plan().cache is not None
    assert "each from where the last one ended" in str(plan())


def test_more_than_a_part_of_the_hosts_memory_is_not_taken(on_an_accelerator, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000))
    assert plan().cache is None


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_the_factors_are_the_same(method, on_an_accelerator):
    expected = calibrate(deep_model("llama"), make_config(corda_method=method), make_batches())
    found = calibrate(
        deep_model("llama"),
        make_config(corda_method=method),
        make_batches(),
        max_memory=40_000,
        progress=False,
    )
    assert bytes_of(found) == bytes_of(expected)
