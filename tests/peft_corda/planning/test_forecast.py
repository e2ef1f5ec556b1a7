"""`peft-corda plan`: cost of a calibration, from a config."""

import json

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from torch.utils.flop_counter import FlopCounterMode

from kprune_ext.common.processes import Processes
from peft_corda import calibrate
from peft_corda.base_model.forward import Runner
from peft_corda.base_model.input_groups import discover, with_cross
from peft_corda.base_model.targets import find_targets
from peft_corda.cli.main import main
from peft_corda.planning import forecast as planner
from peft_corda.planning.forecast import estimate
from peft_corda.planning.plan import make_plan
from tests.helpers.corda import make_batches, make_config, make_model

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="models of transformers 4 do not run without weights"
)
KINDS = ("llama", "gpt2", "bert")
BATCHES = make_batches(count=3, size=4, length=12)
DATA = {"sequences": 12, "length": 12, "batch_size": 4}


def empty(kind):
    with init_empty_weights(include_buffers=True):
        return make_model(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["kpm", "ipm"])
@pytest.mark.parametrize("limit", [None, 60_000, 85_000])
def test_passes_are_those_of_the_real_plan(kind, method, limit):
    if limit is not None and kind == "gpt2":
        limit *= 3  # its widest layer is wider
    model, config = make_model(kind), make_config(kind, corda_method=method)
    targets = find_targets(model, config)
    groups = discover(Runner(model, targets), BATCHES[0]).groups
    if method == "ipm":
        groups = with_cross(groups, targets, config.corda_sketch)
    real = make_plan(Runner(model, targets), BATCHES, BATCHES[0], groups, limit, 4, Processes())
    found = estimate(empty(kind), config, max_memory=limit, **DATA)
    assert found.modules == len(targets)
    assert found.passes == len(real.passes)
    assert found.carried == (real.cache is not None)
    assert found.hidden_states == real.hidden_bytes
    sizes = [sum(group.bytes() for group in groups) for groups in real.passes]
    assert found.statistics == max(sizes)


def test_factors_take_what_they_are_said_to():
    config = make_config(corda_method="kpm")
    found = estimate(empty("llama"), config, methods=("kpm", "ipm"), **DATA)
    factors = calibrate(make_model("llama"), config, BATCHES, methods=("kpm", "ipm"), verbose=False)
    taken = sum(
        tensor.numel() * tensor.element_size()
        for module in factors.modules.values()
        for tensor in (
            module.weight_sample,
            *(part for own in module.directions.values() for part in vars(own).values()),
        )
    )
    assert found.factors == taken + sum(sketch.bytes() for sketch in factors.sketches.values())


def test_flops_of_the_run_are_those_counted():
    model, config = make_model("llama"), make_config()
    found = estimate(empty("llama"), config, **DATA)
    linears = find_targets(model, config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for name, module in linears.items():
            module(torch.zeros(12 * 12, module.in_features))
            assert name
    assert found.forward_flops == counter.get_total_flops()


def test_several_devices_share_the_work():
    one, two = (estimate(empty("llama"), make_config(), gpus=gpus, **DATA) for gpus in (1, 2))
    assert two.decomposition_flops == one.decomposition_flops
    assert 0.5 <= two.decomposition_share < 1 == one.decomposition_share
    assert two.weights == one.weights == one.weights_spread > two.weights_spread


def test_command_prints_and_writes(tmp_path, capsys):
    make_model("llama").config.save_pretrained(tmp_path / "model")
    path = tmp_path / "plan.json"
    options = ["--r", "8", "--num_samples", "12", "--max_length", "12", "--batch_size", "4"]
    main(["plan", "--model", str(tmp_path / "model"), *options, "--gpus", "2", "--json", str(path)])
    printed = capsys.readouterr().out
    assert "14 modules, 1 pass\n" in printed and "Bytes per device (2 in all)" in printed
    found = json.loads(path.read_text())
    assert found.pop("seconds") > 0 and found.pop("device") in ("cpu", "cuda")
    assert found == estimate(empty("llama"), make_config(), gpus=2, **DATA).to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "gpus must be at least 1"),
        (["--max_memory", "1KB"], "max_memory of 1,000 bytes is too small"),
        (
            ["--max_memory", "much"],
            "max_memory=.* is not a valid size. Pass a whole number of bytes",
        ),
        (["--r", "500"], "r=500 is larger than module"),
        (["--target_modules", "nothing"], "No module of LlamaForCausalLM matches"),
    ],
)
def test_mistakes_end_in_a_message(options, message, tmp_path):
    make_model("llama").config.save_pretrained(tmp_path / "model")
    path = tmp_path / "plan.json"
    with pytest.raises(SystemExit, match=message):
        main(["plan", "--model", str(tmp_path / "model"), *options, "--json", str(path)])
    assert not path.exists()


def test_an_old_transformers_is_named(monkeypatch):
    monkeypatch.setattr(planner, "compare_versions", lambda *wanted: wanted[1] == "<")
    with pytest.raises(ValueError, match=r"needs transformers 5 or newer.* is installed"):
        estimate(empty("llama"), make_config(), **DATA)
