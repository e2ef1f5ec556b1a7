"""The parts of the benchmark of the start that could produce a wrong figure."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.common.stopwatch import Stopwatch
from benchmarks.corda_start import layers, tables
from benchmarks.corda_start.sides import Watched, least_flops, phases
from tests.helpers.corda import make_model


def seconds(cpu):
    return {"cpu": cpu, "wall": 2 * cpu}


def run(statistics, decomposition):
    return phases(seconds(statistics), seconds(statistics + decomposition))


def test_ratios_are_of_medians_phase_by_phase():
    ours = [run(1, 2), run(1, 2), run(50, 90)]
    peft = [run(3, 8), run(0, 0), run(3, 8)]
    assert tables.compare_phases(ours, peft)[3:] == ["3.0×", "4.0×", "3.7×", "3.7×"]


def test_phases_end_when_the_data_has_been_seen_in_full():
    watched = Watched([{}, {}], Stopwatch())
    next(iter(watched))  # a look at the first batch is no pass over the data
    assert watched.statistics is None
    with pytest.raises(RuntimeError, match="never run through"):
        phases(watched.statistics, seconds(1.0))
    assert len(list(watched)) == 2
    assert watched.statistics is not None


def test_rotation_is_orthogonal():
    signs = layers.random_signs(15, torch.Generator().manual_seed(0))
    rotation = layers.rotated(torch.eye(15, dtype=torch.float64), signs.double())
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(15, dtype=torch.float64))
    assert rotation.abs().max() < 0.5


@pytest.mark.parametrize("shape", ["24x24", "40x24", "24x40"])
def test_energies_are_measured_against_the_float64_optimum(shape):
    case = layers.LayerCase(shape, "full", rank=4)
    case.run_ours()
    case.run_peft()
    case.judge()
    energies = case.record["energy_relative_to_optimum"]
    assert energies == pytest.approx(dict.fromkeys(energies, 1.0), abs=1e-2)
    assert energies["ours kpm, damping 0.01"] >= 1 - 1e-9
    assert energies["ours ipm, damping 0.01"] <= 1 + 1e-9
    assert case.record["peft_damping"] == layers.DAMPING
    # The best directions of the other end are far off, which tells that the measure can.
    product = case.weight.double() @ layers.damped(case.covariance, layers.DAMPING)
    swapped = layers.energy(case.found["ours", "ipm"], product)
    assert swapped > 10 * layers.energy(case.found["ours", "kpm"], product)


def test_least_operations_are_those_of_products_and_shared_sums():
    model = make_model("llama")
    config = model.config
    side, wide = config.hidden_size, config.intermediate_size
    narrow = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    sample = SimpleNamespace(singles=[{"input_ids": torch.ones(1, 7, dtype=torch.long)}] * 2)
    attention, wide_products = 2 * side * (side + narrow), 3 * side * wide
    # One sum for q, k and v, one for o, one for gate and up; down's own may be of outputs and inputs.
    sums = 3 * side**2 + min(wide**2, 2 * side * wide)
    count = config.num_hidden_layers
    assert least_flops(model, sample) == {
        "forward": 2 * 14 * count * (attention + wide_products),
        "sums": 14 * count * sums,
    }


def test_least_seconds_take_each_product_at_its_own_rate():
    cell = {
        "dtype": "bfloat16",
        "flops_per_second": {"bfloat16": 200.0, "float32": 50.0},
        "least_flops": {"forward": 400, "sums": 150},
    }
    assert tables.least_seconds(cell) == 5.0
