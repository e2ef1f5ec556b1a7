"""Arguments of `calibrate`: memory, methods and precision."""

import pytest
import torch

from peft_corda import calibrate
from peft_corda.base_model.forward import Runner
from peft_corda.base_model.input_groups import discover
from peft_corda.base_model.targets import find_targets
from peft_corda.calibration.collect import PassOptions, collect_covariances
from tests.helpers.corda import covariances_of, make_batches, make_config, make_model


def refused(message, **options):
    model, config = make_model("llama"), make_config()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        calibrate(model, config, make_batches(), **options)
    assert not calls and config.corda_factors is None


@pytest.mark.parametrize("given", ["abc", "", "12", "GB", "-5GB", -1, 1.5, True, "nanGB", "infGB"])
def test_memory_that_is_no_size(given):
    refused(
        f"max_memory={given!r} is not a valid size. Pass a whole number of bytes",
        max_memory=given,
    )


@pytest.mark.parametrize("given", ["1MB", "1 MiB", "0.001GB", 10**6])
def test_memory_in_several_units(given):
    calibrate(make_model("llama"), make_config(), make_batches(), given, verbose=False)


@pytest.mark.parametrize("given", [(), [], "kpm", ("kpm", "best"), [1]])
def test_methods_that_are_none(given):
    refused(
        r"methods must be one or more of \('kpm', 'ipm', 'sc_lora', 'lora_null'\), got",
        methods=given,
    )


def test_methods_without_the_configs_own():
    refused(r"methods=\['ipm'\] leaves out the config's own corda_method='kpm'", methods=["ipm"])


def test_methods_in_any_order_and_twice():
    factors = calibrate(
        make_model("llama"),
        make_config(),
        make_batches(),
        methods=["ipm", "kpm", "ipm"],
        verbose=False,
    )
    assert factors.methods == ("kpm", "ipm")
    assert list(next(iter(factors.modules.values())).directions) == ["kpm", "ipm"]


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.int64, "float32"])
def test_precision_that_is_too_low(given):
    refused("dtype must be torch.float32 or torch.float64, got", dtype=given)


def test_double_precision_sums():
    """Products of float32 inputs are exact in float64: their sum is right to the last digits."""
    model, batches = make_model("llama"), make_batches()
    targets = find_targets(model, make_config())
    groups = discover(Runner(model, targets), batches[0]).groups
    options = PassOptions(dtype=torch.float64)
    found = collect_covariances(Runner(model, targets), batches, groups, options)
    single = covariances_of(model, targets, batches)
    name = "model.layers.0.mlp.down_proj"
    rows = []
    handle = targets[name].register_forward_pre_hook(lambda _, args: rows.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    inputs = torch.cat([row.flatten(0, 1) for row in rows])
    expected = inputs.T @ inputs / len(inputs)
    assert found[name].matrix.dtype == torch.float64
    assert (found[name].matrix - expected).norm() <= 1e-14 * expected.norm()
    assert (single[name].matrix - expected).norm() > 1e-9 * expected.norm()


def test_double_precision_takes_twice_the_memory(capsys):
    for dtype in (torch.float32, torch.float64):
        calibrate(make_model("llama"), make_config(), make_batches(), dtype=dtype)
    plans = [line for line in capsys.readouterr().err.splitlines() if "modules:" in line]
    assert ["covariances of 0.1 MB in" in plans[0], "covariances of 0.2 MB in" in plans[1]] == [
        True
    ] * 2
