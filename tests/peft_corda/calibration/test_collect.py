"""Collecting statistics: what counts, and that the model is left as it was."""

import copy

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from peft_corda import calibrate
from peft_corda.base_model.targets import find_targets
from peft_corda.batches.masks import kept_rows
from peft_corda.decomposition.covariance import CovarianceAccumulator, damped
from tests.helpers.corda import MODELS, covariances_of, make_batches, make_config, make_model


def state_of(model):
    return (
        copy.deepcopy(model.state_dict()),
        [module.training for module in model.modules()],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
    )


def assert_same_state(model, before):
    weights, *rest = state_of(model)
    assert weights.keys() == before[0].keys()
    assert all(torch.equal(weights[name], before[0][name]) for name in weights)
    assert tuple(rest) == before[1:]


@pytest.mark.parametrize("kind", list(MODELS))
def test_calibration_leaves_the_model_as_it_was(kind):
    model = make_model(kind)
    model.train()
    next(model.children()).eval()  # a mixture of modes must come back too
    before = state_of(model)
    calibrate(model, make_config(kind), make_batches())
    assert_same_state(model, before)


def test_calibration_leaves_the_model_as_it_was_after_an_error():
    model = make_model("llama").train()
    before = state_of(model)

    def failing():
        yield make_batches()[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        calibrate(model, make_config(), failing())
    assert_same_state(model, before)


def test_batch_size_does_not_matter():
    model = make_model("llama")
    targets = find_targets(model, make_config())
    together = make_batches(count=1, size=6)[0]
    singly = [{key: value[i : i + 1] for key, value in together.items()} for i in range(6)]
    expected = covariances_of(model, targets, [together])
    found = covariances_of(model, targets, singly)
    for name in targets:
        torch.testing.assert_close(found[name].matrix, expected[name].matrix, rtol=1e-5, atol=1e-6)


def test_labels_and_unused_outputs_are_not_computed():
    model = make_model("llama")
    called = []
    model.lm_head.register_forward_pre_hook(lambda *_: called.append(True))
    batches = [{**batch, "labels": batch["input_ids"]} for batch in make_batches()]
    calibrate(model, make_config(), batches)
    assert not called


def test_head_can_be_a_target():
    model = make_model("llama")
    factors = calibrate(model, make_config(target_modules=["lm_head"]), make_batches())
    assert list(factors.modules) == ["lm_head"]


def test_any_torch_module_will_do():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 4)

        def forward(self, x):
            return self.second(self.first(x).relu())

    net = Net()
    config = make_config(r=2, target_modules=["first", "second"], task_type=None)
    factors = calibrate(net, config, [{"x": torch.randn(5, 6)}, {"x": torch.randn(3, 6)}])
    assert {name: module.shape for name, module in factors.modules.items()} == {
        "first": (9, 6),
        "second": (4, 9),
    }
    assert factors.tokens == 8


def record_calls(model):
    calls = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    return calls


def factors_equal(first, second):
    return first.modules.keys() == second.modules.keys() and all(
        torch.equal(
            getattr(first.modules[name].directions[method], part),
            getattr(second.modules[name].directions[method], part),
        )
        for name in first.modules
        for method in first.methods
        for part in ("U", "S")
    )


@pytest.mark.parametrize("kind", list(MODELS))
def test_memory_limit_changes_the_passes_and_nothing_else(kind):
    model = make_model(kind)
    whole = calibrate(model, make_config(kind), make_batches())
    widest = 4 * max(shape[1] for shape in (m.shape for m in whole.modules.values())) ** 2
    for limit in (widest, f"{2 * widest // 1000 + 1}KB"):
        calls = record_calls(model)
        parts = calibrate(model, make_config(kind), make_batches(), max_memory=limit)
        assert factors_equal(parts, whole) and parts.tokens == whole.tokens
        assert calls.count(model.base_model_prefix) > 2 * len(make_batches())


def test_a_pass_ends_behind_its_last_module():
    model = make_model("llama")
    calls = record_calls(model)
    calibrate(model, make_config(target_modules=["layers.0.self_attn.q_proj"]), make_batches())
    assert calls.count("model.layers.0") == 1 + len(make_batches())
    assert calls.count("model.layers.1") == 1  # once, to find out which modules share an input


def test_an_iterator_lasts_for_several_passes():
    model = make_model("llama")
    whole = calibrate(model, make_config(), make_batches())
    parts = calibrate(model, make_config(), iter(make_batches()), max_memory=4 * 80**2)
    assert factors_equal(parts, whole)


class TestEncoderDecoder:
    model = staticmethod(
        lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
                decoder_start_token_id=0,
            )
        ).eval()
    )  # fmt: skip
    config = staticmethod(lambda: make_config(task_type="SEQ_2_SEQ_LM", r=4))

    def batch(self, padding):
        ids = torch.randint(3, 99, (3, 9))
        mask = torch.ones_like(ids)
        mask[0, 9 - padding :] = 0
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": torch.randint(3, 99, (3, 5)),
        }

    def test_both_sides_are_counted(self):
        model = self.model()
        targets = find_targets(model, self.config())
        found = covariances_of(model, targets, [self.batch(0), self.batch(0)])
        cross = "decoder.block.0.layer.1.EncDecAttention"
        tokens = {name: found[f"{cross}.{name}"].tokens for name in "qkvo"}
        assert tokens == {"q": 30, "k": 54, "v": 54, "o": 30}

    def test_padding_is_cut_off(self):
        """Whether a module sees the encoder's or the decoder's tokens cannot be told."""
        model = self.model()
        targets = find_targets(model, self.config())
        padded = self.batch(2)
        one_by_one = [
            {
                "input_ids": padded["input_ids"][row : row + 1, : 7 if row == 0 else 9],
                "decoder_input_ids": padded["decoder_input_ids"][row : row + 1],
            }
            for row in range(3)
        ]
        found = covariances_of(model, targets, [padded])
        expected = covariances_of(model, targets, one_by_one)
        for name in targets:
            assert found[name].tokens == expected[name].tokens
            torch.testing.assert_close(found[name].matrix, expected[name].matrix)


class TestKeptRows:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]]).bool()
    inputs = torch.arange(9 * 2).reshape(3, 3, 2)

    def test_tokens(self):
        rows = kept_rows("m", self.inputs, self.mask)
        assert torch.equal(rows, self.inputs.reshape(9, 2)[[0, 1, 4, 5]])

    def test_flattened_tokens(self):
        rows = kept_rows("m", self.inputs.reshape(9, 2), self.mask)
        assert torch.equal(rows, self.inputs.reshape(9, 2)[[0, 1, 4, 5]])

    def test_one_vector_a_sequence(self):
        rows = kept_rows("m", self.inputs[:, 0], self.mask)
        assert torch.equal(rows, self.inputs[:2, 0])

    def test_no_mask(self):
        assert kept_rows("m", self.inputs, None).shape == (9, 2)

    def test_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"The input of m has shape \(3, 4, 2\)"):
            kept_rows("m", torch.zeros(3, 4, 2), self.mask)


def test_bfloat16_inputs_are_summed_in_float32():
    accumulator = CovarianceAccumulator(1)
    for _ in range(1000):
        accumulator.update(torch.ones(1, 1, dtype=torch.bfloat16))
    found = accumulator.finish()
    assert found.matrix.dtype == torch.float32
    assert found.matrix.item() == 1.0 and found.tokens == 1000


@pytest.mark.parametrize("features", [1, 191, 193, 1600])
def test_blocks_of_any_size_give_the_whole_product(features):
    inputs = torch.randn(7, features)
    accumulator = CovarianceAccumulator(features)
    accumulator.update(inputs[:4])
    accumulator.update(inputs[4:])
    found = accumulator.finish().matrix
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, inputs.T @ inputs / 7, rtol=1e-5, atol=1e-5)


def test_damping_of_a_layer_that_saw_only_zeros():
    assert torch.equal(damped(torch.zeros(3, 3), 0.01), torch.eye(3, dtype=torch.float64))
