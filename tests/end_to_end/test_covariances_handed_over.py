"""Pruning hands the covariances of the pruned model's layers over: an adapter starts without a pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from kprune_ext import KPruneConfig, kprune
from kprune_ext.calibration.input_sums import inputs_file
from kprune_ext.files.input_sums import InputSums
from kprune_ext.modeling.copying import record_kept
from kprune_ext.preparation.rehearsal import rehearse
from kprune_ext.preparation.run import prepared
from kprune_ext.pruning import prune_sublayers
from peft_corda import CordaConfig, calibrate, initialize_corda
from peft_corda.base_model.targets import find_targets
from tests.end_to_end.test_kprune_given import Wrapper
from tests.helpers.corda import covariances_of
from tests.helpers.kprune import assert_same_state, padded, sequences, state_of, tiny_bert
from tests.helpers.kprune_decoders import CUTS, decoder_batches, tiny_decoder
from tests.helpers.kprune_models import tiny

LINEAR = {"bert": r".*\.layer\.\d+\..*(query|key|value|dense)", "decoder": "all-linear"}
BATCHES = padded(sequences(16))
DECODER_BATCHES = decoder_batches(16, side="right")


def config_for(kind: str = "decoder", **options: Any) -> CordaConfig:
    given = {"r": 4, "lora_alpha": 4, "target_modules": LINEAR[kind], "corda_method": "kpm"}
    return CordaConfig(**{**given, **options})


def pruned_with(model: Any, batches: Any, path: Any, predict: Any = None, **options: Any) -> Any:
    given = {"reduction": 0.4, "held_out": 0.0, "min_share": 0.7, "schedule": "once", **options}
    config = KPruneConfig(**given)
    return kprune(model, batches, config, predict=predict, covariances=path, progress=False)


def cut_with(model: Any, kept: Any, path: Any, **options: Any) -> Any:
    """A run in which these units stay, without a measurement of what they know."""
    config = KPruneConfig(**{"held_out": 0.0, **options})
    with (
        prepared(model, DECODER_BATCHES, config) as run,
        inputs_file(path, "", run.student, run.processes) as file,
    ):
        prune_sublayers(run, [units for layer in kept for units in layer], inputs=file)
        record_kept(run.pruned, kept)
    return run


def calibrated(model: Any, config: CordaConfig, *data: Any, **options: Any) -> Any:
    return calibrate(model, config, *data, progress=False, **options)


def assert_same_covariances(path: Any, model: Any, config: CordaConfig, batches: Any) -> None:
    """The file has what a pass of CorDA over the same data sums up, for the same modules."""
    expected = covariances_of(model, find_targets(model, config), batches)
    sums, seen = InputSums.open(path), set()
    for layer in sums.layers:
        matrix = sums.read(layer) / layer.tokens
        for name in layer.modules:
            seen.add(name)
            assert layer.tokens == expected[name].tokens
            torch.testing.assert_close(matrix, expected[name].matrix, rtol=1e-4, atol=1e-5)
    assert seen == set(expected)


def assert_same_factors(one: Any, other: Any) -> None:
    """The same subspaces and singular values, and sketches of the same energy."""
    assert one.methods == other.methods and list(one.modules) == list(other.modules)
    for name, module in one.modules.items():
        theirs = other.modules[name]
        assert (module.tokens, module.shape) == (theirs.tokens, theirs.shape)
        assert module.inputs == theirs.inputs
        for method, own in module.directions.items():
            their = theirs.directions[method]
            torch.testing.assert_close(own.S, their.S, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(own.U @ own.U.T, their.U @ their.U.T, rtol=0, atol=1e-3)
    assert one.sketches.keys() == other.sketches.keys()
    for name, sketch in one.sketches.items():
        assert sketch.energy == pytest.approx(other.sketches[name].energy, rel=1e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Any, Any]:
    """A pruned decoder and the file of its covariances."""
    path = tmp_path_factory.mktemp("llama") / "covariances"
    return pruned_with(tiny_decoder("llama"), DECODER_BATCHES, path), path


@pytest.mark.parametrize(("layout", "side"), [("free", "left"), ("uniform", "right")])
def test_a_decoders_factors_are_those_of_its_own_pass(layout, side, tmp_path) -> None:
    batches, path = decoder_batches(16, side=side), tmp_path / "covariances.safetensors"
    model = tiny_decoder("llama")
    before = state_of(model)
    pruned = pruned_with(model, batches, path, layout=layout)
    assert_same_state(before, state_of(model))
    assert not any(module._forward_pre_hooks for module in pruned.modules())
    for methods in (["kpm", "ipm"], ["ipm"]):  # ipm alone takes cross-covariances of data
        config = config_for(corda_method=None)
        found = calibrated(pruned, config, covariances=path, methods=methods)
        assert config.corda_factors is found
        assert_same_factors(
            found, calibrated(pruned, config_for(corda_method=None), batches, methods=methods)
        )
    assert_same_covariances(path, pruned, config_for(task_type="CAUSAL_LM"), batches)


def test_an_encoders_factors_are_those_of_its_own_pass(tmp_path) -> None:
    path = tmp_path / "covariances"
    pruned = pruned_with(tiny_bert(), BATCHES, path)
    found = calibrated(pruned, config_for("bert"), covariances=path)
    assert_same_factors(found, calibrated(pruned, config_for("bert"), BATCHES))
    assert_same_covariances(path, pruned, config_for("bert"), BATCHES)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma2"])
def test_other_families_of_decoders(family, tmp_path) -> None:
    run = cut_with(tiny_decoder(family), CUTS["some"], tmp_path / "sums")
    config = config_for(task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2", r=1)
    assert_same_covariances(tmp_path / "sums", run.pruned, config, DECODER_BATCHES)
    calibrated(run.pruned, config, covariances=tmp_path / "sums")  # the file is this model's


def test_the_method_of_null_directions_takes_a_file_too(llama) -> None:
    pruned, path = llama
    found = calibrated(pruned, config_for(corda_method="lora_null"), covariances=path)
    expected = calibrated(pruned, config_for(corda_method="lora_null"), DECODER_BATCHES)
    assert_same_factors(found, expected)


@pytest.mark.parametrize(
    ("cut", "gone"), [("no heads first", "0.self_attn"), ("no neurons", "[02].mlp")]
)
def test_a_sub_layer_that_is_gone_has_no_covariance(cut, gone, tmp_path) -> None:
    run = cut_with(tiny_decoder("llama"), CUTS[cut], tmp_path / "sums")
    config = config_for(task_type="CAUSAL_LM", exclude_modules=rf".*layers.{gone}.*", r=1)
    assert_same_covariances(tmp_path / "sums", run.pruned, config, DECODER_BATCHES)


def test_an_adapter_starts_and_trains_as_one_from_data(llama) -> None:
    pruned, batch = copy.deepcopy(llama[0]), DECODER_BATCHES[0]
    expected = pruned(**batch).logits
    adapted = get_peft_model(pruned, config_for(corda_method="ipm"))
    initialize_corda(adapted, covariances=llama[1], progress=False)
    torch.testing.assert_close(adapted(**batch).logits, expected)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in adapted.parameters())


def test_held_out_samples_and_those_beyond_the_limit_do_not_count(tmp_path) -> None:
    tokens = sum(int(batch["attention_mask"].sum()) for batch in DECODER_BATCHES)
    for options in ({"held_out": 0.2}, {"max_tokens": tokens // 2}):
        run = cut_with(tiny_decoder("llama"), CUTS["some"], tmp_path / "sums", **options)
        layers = InputSums.open(tmp_path / "sums").layers
        assert {layer.tokens for layer in layers} == {run.data.tokens}
        assert run.data.tokens < tokens


def test_names_are_those_in_what_is_returned(tmp_path) -> None:
    model = Wrapper(tiny("bert", "embeddings"))
    pruned_with(model, BATCHES, tmp_path / "sums", predict=lambda model, batch: model(**batch))
    names = {name for layer in InputSums.open(tmp_path / "sums").layers for name in layer.modules}
    assert names and names <= {f"{name}" for name, _ in model.named_modules()}
    assert all(name.startswith("encoder.encoder.layer.") for name in names)


def test_relative_positions_of_deberta_are_not_taken_for_tokens(tmp_path) -> None:
    pruned_with(tiny("deberta-v2"), BATCHES, tmp_path / "sums")
    names = {name for layer in InputSums.open(tmp_path / "sums").layers for name in layer.modules}
    assert any(name.endswith("value_proj") for name in names)
    assert not any("pos_" in name for name in names)


def test_sixteen_bits_are_summed_in_float32_and_double_precision_in_its_own(tmp_path) -> None:
    for given, summed in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        cut_with(tiny_decoder("llama", dtype=given), CUTS["some"], tmp_path / "sums")
        assert {value.dtype for value in load_file(tmp_path / "sums").values()} == {summed}


def test_a_callback_checks_the_path_before_training(tmp_path) -> None:
    rehearse(tiny_bert(), BATCHES, covariances=tmp_path / "sums")
    with pytest.raises(ValueError, match="is a folder"):
        rehearse(tiny_bert(), BATCHES, covariances=tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_is_wrong_is_said_before_the_work(tmp_path) -> None:
    calls: list[int] = []
    model = tiny_bert()
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"covariances='.*' is a folder"):
        kprune(model, BATCHES, covariances=tmp_path)
    with pytest.raises(ValueError, match="covariances is empty"):
        kprune(model, BATCHES, covariances=" ")
    assert not calls


class TestRefusals:
    @pytest.fixture(scope="class")
    def pruned(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("refusals") / "sums"
        return pruned_with(tiny_bert(), BATCHES, path), path

    def refused(self, pruned, message, config=None, **options) -> None:
        config = config or config_for("bert")
        with pytest.raises(ValueError, match=message):
            calibrated(pruned, config, **options)
        assert config.corda_factors is None

    def test_modules_that_pruning_does_not_see(self, pruned) -> None:
        model, path = pruned
        config = config_for("bert", target_modules="all-linear", r=2)
        message = r"no covariance of bert\.pooler\.dense, classifier, of .* exclude_modules"
        self.refused(model, message, config, covariances=path)

    def test_another_model(self, pruned) -> None:
        message = "belongs to another model: weight shapes .* differ for bert"
        self.refused(tiny_bert(), message, covariances=pruned[1])

    def test_another_model_of_the_same_shapes(self, pruned) -> None:
        other = copy.deepcopy(pruned[0])
        with torch.no_grad():
            other.get_submodule("bert.encoder.layer.1.output.dense").weight.mul_(1.1)
        message = r"another model: the weights of bert\.encoder\.layer\.1\.output\.dense are not"
        self.refused(other, message, covariances=pruned[1])
        calibrated(copy.deepcopy(pruned[0]).bfloat16(), config_for("bert"), covariances=pruned[1])

    def test_a_model_of_other_names(self, pruned) -> None:
        config, message = config_for(), r"has no covariance of model\.layers.* It has bert\."
        self.refused(tiny_decoder("llama"), message, config, covariances=pruned[1])

    def test_two_sets_of_data(self, pruned) -> None:
        config = config_for("bert", corda_method="sc_lora")
        self.refused(pruned[0], "has those of one set", config, covariances=pruned[1])

    def test_both_or_neither(self, pruned) -> None:
        self.refused(pruned[0], "was given neither")
        self.refused(pruned[0], "was given both", dataloader=BATCHES, covariances=pruned[1])

    def test_options_of_passes(self, pruned) -> None:
        message = "max_memory and checkpoint_dir cannot be combined with covariances"
        options = {"max_memory": "1MB", "checkpoint_dir": "folder"}
        self.refused(pruned[0], message, covariances=pruned[1], **options)
