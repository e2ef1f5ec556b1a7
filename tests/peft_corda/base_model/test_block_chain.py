"""Passes that start where the last one ended: the same result, and blocks that are done with rest."""

from functools import partial

import pytest
import torch
import transformers
from torch import nn

from kprune_ext.common.processes import Processes
from peft_corda import CordaConfig, calibrate
from peft_corda.base_model.forward import Runner
from peft_corda.base_model.input_groups import discover
from peft_corda.base_model.targets import find_targets
from peft_corda.calibration.collect import PassOptions, collect_covariances
from peft_corda.planning.plan import make_plan
from tests.helpers.block_nets import (
    CONFIG,
    NOT_CHAINS,
    Block,
    InPlace,
    net_and_batches,
    plain,
    through_shared,
    with_cache,
)
from tests.helpers.corda import (
    MODELS,
    bytes_of,
    deep_model,
    make_batches,
    make_config,
    padded_batches,
)

TOKENS = 3 * 4 * 12  # of make_batches()
HIDDEN = TOKENS * 48 * 4
CARRIED = "each from where the last one ended"
NOT_CARRIED = "each from the start of the model"


def widest(model, config, batches):
    """Bytes of the largest covariance."""
    groups = discover(Runner(model, find_targets(model, config)), batches[0]).groups
    return max(group.bytes() for group in groups)


def plan_for(model, config, batches, limit):
    targets = find_targets(model, config)
    groups = discover(Runner(model, targets), batches[0]).groups
    return targets, make_plan(
        Runner(model, targets), batches, batches[0], groups, limit, 4, Processes()
    )


def blocks_run(model, run):
    """The blocks whose attention is run by `run()`, in order."""
    seen = []
    handles = [
        block.self_attn.register_forward_pre_hook(lambda *_, block=block: seen.append(block))
        for block in model.model.layers
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def assert_untouched(model):
    for name, module in model.named_modules():
        assert "forward" not in module.__dict__, name
        assert not module._forward_pre_hooks and not module._forward_hooks, name


@pytest.mark.parametrize("batches", [make_batches(), padded_batches()], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_carrying_hidden_states_changes_nothing(kind, batches, capsys):
    model, config = deep_model(kind), make_config(kind)
    whole = bytes_of(calibrate(model, config, batches))
    least = widest(model, config, batches)
    # BERT's blocks of transformers 4 return pairs, and so are no chain.
    pairs = kind == "bert" and transformers.__version__.startswith("4.")
    carried = NOT_CARRIED if pairs else CARRIED
    for limit, expected in [
        (HIDDEN + least, carried),  # a few groups at a time: blocks are cut in the middle
        (HIDDEN + 3 * least, carried),
        (HIDDEN + least - 1, NOT_CARRIED),
    ]:
        capsys.readouterr()
        assert bytes_of(calibrate(model, config, batches, max_memory=limit)) == whole
        assert expected in capsys.readouterr().err
        assert_untouched(model)


def test_blocks_that_are_done_with_are_not_run():
    model, config, batches = deep_model("llama"), make_config(), make_batches()
    targets, plan = plan_for(model, config, batches, HIDDEN + 4 * 80**2)
    assert any(span.first == span.last == span.following for span in plan.spans)  # cut in a block
    assert any(span.last < span.following for span in plan.spans[:-1])  # and between two
    for number, groups in enumerate(plan.passes):
        options = PassOptions()
        one_pass = partial(
            collect_covariances,
            Runner(model, targets),
            batches,
            groups,
            options,
            plan.carried(number),
        )
        span = plan.spans[number]
        expected = list(model.model.layers[span.first : span.last + 1]) * len(batches)
        assert blocks_run(model, one_pass) == expected


@pytest.mark.parametrize("name", list(NOT_CHAINS))
def test_blocks_that_form_no_chain_are_run_from_the_start(name, capsys):
    net, batches = net_and_batches(NOT_CHAINS[name])
    whole = bytes_of(calibrate(net, CordaConfig(**CONFIG), batches))
    capsys.readouterr()
    parts = calibrate(net, CordaConfig(**CONFIG), batches, max_memory=1250)
    assert NOT_CARRIED in capsys.readouterr().err
    assert bytes_of(parts) == whole
    assert_untouched(net)


@pytest.mark.parametrize("block", [Block, InPlace])
@pytest.mark.parametrize("run", [plain, through_shared])
def test_targets_in_front_of_between_and_behind_the_blocks(run, block, capsys):
    """One covariance at a time. The shared layer is called again by blocks of later passes."""
    net, batches = net_and_batches(run, block)
    whole = bytes_of(calibrate(net, CordaConfig(**CONFIG), batches))
    capsys.readouterr()
    parts = calibrate(net, CordaConfig(**CONFIG), batches, max_memory=1250)
    assert CARRIED in capsys.readouterr().err
    assert bytes_of(parts) == whole


def test_a_hook_of_the_users_is_applied_once(capsys):
    """Passing on the output of a hooked block would apply its hook again."""
    net, batches = net_and_batches(plain)
    handle = net.blocks[3].register_forward_hook(lambda module, args, output: output + 1)
    whole = bytes_of(calibrate(net, CordaConfig(**CONFIG), batches))
    capsys.readouterr()
    parts = calibrate(net, CordaConfig(**CONFIG), batches, max_memory=1250)
    assert NOT_CARRIED in capsys.readouterr().err
    assert bytes_of(parts) == whole
    handle.remove()


def test_language_model_head_behind_the_blocks():
    model, batches = deep_model("llama"), make_batches()
    config = make_config(target_modules=["q_proj", "down_proj", "lm_head"])
    whole = bytes_of(calibrate(model, config, batches))
    limit = HIDDEN + 4 * 80**2
    assert plan_for(model, config, batches, limit)[1].cache is not None
    assert bytes_of(calibrate(model, config, batches, max_memory=limit)) == whole


def test_an_error_in_the_middle_of_a_pass_leaves_the_model_as_it_was():
    model = deep_model("llama")

    def fail(module, args):
        # In a pass that leaves out blocks; the planner's example is a single row.
        if "forward" in model.model.layers[0].__dict__ and len(args[0]) > 1:
            raise OSError("out of luck")

    handle = model.model.layers[-1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(OSError, match="out of luck"):
        calibrate(model, make_config(), make_batches(), max_memory=HIDDEN + 4 * 80**2)
    handle.remove()
    assert_untouched(model)


def test_a_forward_of_the_users_own_stays_in_place():
    net, batches = net_and_batches(plain)
    own = net.blocks[1].forward
    net.blocks[1].forward = own
    calibrate(net, CordaConfig(**CONFIG), batches, max_memory="2KB")
    assert net.blocks[1].__dict__["forward"] is own


def test_plan_says_what_is_done(capsys):
    model, config, batches = deep_model("llama"), make_config(), make_batches()
    calibrate(model, config, batches)
    calibrate(model, config, batches, max_memory="80KB")
    calibrate(model, config, batches, max_memory="30KB")
    calibrate(model, config, batches, verbose=False)
    plans = [line for line in capsys.readouterr().err.splitlines() if "modules:" in line]
    assert plans == [
        "Calibrating 35 modules: 20 covariances of 0.3 MB in 1 pass.",
        "Calibrating 35 modules: 20 covariances of 0.3 MB in 7 passes of up to 0.0 MB, each from "
        "where the last one ended (hidden states: 0.0 MB).",
        "Calibrating 35 modules: 20 covariances of 0.3 MB in 10 passes of up to 0.0 MB, each from "
        "the start of the model.",
    ]


@pytest.mark.parametrize(
    ("run", "share", "carried"), [(plain, 8, True), (with_cache, 4, False)], ids=["chain", "none"]
)
def test_default_limit(run, share, carried, monkeypatch):
    """An eighth of the weights; a quarter where each pass more would run the whole model again."""
    monkeypatch.setattr("peft_corda.planning.plan._LEAST_DEFAULT", 0)
    net, batches = net_and_batches(run)
    # An eighth is a few covariances and the hidden states of a batch, a quarter not all covariances.
    weights = 5600
    own = sum(weight.numel() for weight in net.parameters())
    net.unused = nn.Parameter(torch.zeros(weights // 4 - own))
    config = CordaConfig(**CONFIG)
    _, plan = plan_for(net, config, batches[:1], None)
    _, same = plan_for(net, config, batches[:1], weights // share)
    assert len(plan.passes) > 1
    assert plan.passes == same.passes
    assert (plan.carried(0) is not None) == carried
