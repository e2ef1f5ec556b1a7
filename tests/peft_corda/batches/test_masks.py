"""Which rows count under padding and in packs, and experts that see tokens in an order of their own."""

import pytest
import torch
from torch import nn

from peft_corda import CordaConfig, calibrate
from peft_corda.base_model.targets import find_targets
from peft_corda.batches.masks import is_broadcastable, token_mask
from peft_corda.decomposition.covariance import damped
from tests.helpers.corda import covariances_of, make_config, make_model


class TestPackedMasks:
    looks = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()[
        None, None
    ]
    counts = torch.tensor([[True, True, True, False]])

    def test_bool(self):
        assert torch.equal(token_mask(self.looks), self.counts)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("hidden", ["least", -torch.inf, -1e4])
    def test_additive(self, dtype, hidden):
        value = torch.finfo(dtype).min if hidden == "least" else hidden
        mask = torch.zeros(1, 1, 4, 4, dtype=dtype).masked_fill(~self.looks, value)
        assert torch.equal(token_mask(mask), self.counts)

    def test_whole_numbers_are_refused(self):
        with pytest.raises(
            ValueError, match="dtype torch.int64. Packed sequences take a mask of bool"
        ):
            token_mask(self.looks.long())

    def test_a_model_counts_what_looks_at_itself(self):
        model = make_model("llama")
        targets = find_targets(model, make_config())
        ids = torch.randint(3, 99, (1, 4))
        batch = {"input_ids": ids, "attention_mask": self.looks}
        found = covariances_of(model, targets, [batch])
        alone = covariances_of(model, targets, [{"input_ids": ids[:, :2]}])
        name = "model.layers.0.self_attn.q_proj"
        assert {c.tokens for c in found.values()} == {3}
        rows = 3 * found[name].matrix - 2 * alone[name].matrix  # what the third token adds
        assert torch.linalg.matrix_rank(rows, rtol=1e-3) == 1


def test_broadcastable():
    assert all(is_broadcastable(leading, (3, 4)) for leading in [(3, 4), (12,), (3,)])
    assert not any(
        is_broadcastable(leading, (3, 4)) for leading in [(4,), (4, 3), (3, 4, 1), (11,)]
    )


class Experts(nn.Module):
    """Each token goes to the expert that a gate chooses, as in mixtures of experts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, inputs_embeds, attention_mask=None):
        rows = inputs_embeds.reshape(-1, 6)
        chosen = self.gate(rows).argmax(dim=1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            own = chosen == number
            if own.any():
                out[own] = expert(rows[own])
        return out.reshape(inputs_embeds.shape)

    def rows_of(self, number, inputs):
        rows = inputs.reshape(-1, 6)
        return int((self.gate(rows).argmax(dim=1) == number).sum())


def padded(sequences):
    batch = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=9.0)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(s)) for s in sequences], batch_first=True)
    return {"inputs_embeds": batch, "attention_mask": mask}


def sequences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3 + n % 5, 6, generator=generator) for n in range(count)]


@torch.no_grad()
def assert_counted_as_one_by_one(net, numbers, batches):
    """Each expert's inputs, gathered by hand from sequences without padding, give its statistics."""
    config = CordaConfig(r=2, target_modules=[f"experts.{number}" for number in numbers])
    found = calibrate(net, config, [padded(batch) for batch in batches], verbose=False)
    rows = torch.cat([sequence for batch in batches for sequence in batch])
    chosen = net.gate(rows).argmax(dim=1)
    for number in numbers:
        own = rows[chosen == number].double()
        module = found.modules[f"experts.{number}"]
        assert module.tokens == len(own)
        product = net.experts[number].weight.double() @ damped(own.T @ own / len(own), 0.01)
        assert module.energy == pytest.approx(float(product.square().sum()), rel=1e-5)


def test_experts_under_padding():
    net = Experts()
    batches = [sequences(8, seed) for seed in range(4)]
    assert_counted_as_one_by_one(net, [0, 1, 2], batches)


def test_an_expert_with_as_many_rows_as_the_batch_has():
    """It looks as if it saw one vector a sequence, of which the mask could leave some out."""
    net = Experts()
    for seed in range(200):
        batch = sequences(4, seed)
        inputs = padded(batch)["inputs_embeds"]
        rows = [net.rows_of(0, inputs), net.rows_of(0, inputs[:1])]
        if rows == [4, 0]:
            break
    assert rows == [4, 0]
    assert_counted_as_one_by_one(net, [0], [sequences(4, 500), batch])


@pytest.mark.parametrize("first_rows", [1, 7])
def test_chance_in_the_first_example(first_rows):
    """The expert gets one row of the first example, or all: as a pooler, or a flattened input, would."""
    net = Experts()
    for seed in range(5000):
        batch = sequences(5, seed)[::-1]  # the longest, of seven tokens, first
        inputs = padded(batch)["inputs_embeds"]
        if net.rows_of(0, inputs[:1]) == first_rows and net.rows_of(0, inputs) not in (5, 35):
            break
    assert net.rows_of(0, inputs[:1]) == first_rows
    assert_counted_as_one_by_one(net, [0], [batch, sequences(5, 9999)])
