"""Which modules share a covariance: those that are given the very same tensors, every time."""

import pytest
import torch
from torch import nn

from peft_corda.base_model.forward import Runner
from peft_corda.base_model.input_groups import discover
from tests.helpers.corda import covariances_of


class Repeated(nn.Module):
    """Three rounds of one layer; `once` sees what it sees in the second, `beside` in each."""

    def __init__(self):
        super().__init__()
        self.round, self.once, self.beside = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        for number in range(3):
            y = self.round(x)
            if number == 1:
                y = y + self.once(x)
            x = y + self.beside(x)
        return x


def targets_of(net, *names):
    return {name: net.get_submodule(name) for name in names}


def test_layer_that_is_called_more_often_is_in_another_group():
    net = Repeated()
    targets = targets_of(net, "round", "once", "beside")
    groups = discover(Runner(net, targets), {"x": torch.randn(5, 6)}).groups
    assert [group.members for group in groups] == [("round", "beside"), ("once",)]
    assert [group.called_once for group in groups] == [False, True]


def test_layers_that_are_called_several_times_are_counted_each_time():
    net, x = Repeated(), torch.randn(5, 6)
    found = covariances_of(net, targets_of(net, "round", "once", "beside"), [{"x": x}])
    assert {name: c.tokens for name, c in found.items()} == {"round": 15, "once": 5, "beside": 15}
    with torch.no_grad():
        second = net.round(x) + net.beside(x)
    torch.testing.assert_close(found["once"].matrix, second.T @ second / 5)


def test_order_is_that_of_the_forward_pass():
    net = nn.Sequential()
    net.add_module("b", nn.Linear(4, 4))
    net.add_module("a", nn.Linear(4, 4))
    groups = discover(Runner(net, targets_of(net, "a", "b")), {"input": torch.randn(2, 4)}).groups
    assert [group.leader for group in groups] == ["b", "a"]


def test_first_batch_without_a_token():
    class TwoSequences(nn.Module):
        config = type("Config", (), {"is_encoder_decoder": True})()

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs_embeds):
            return self.layer(inputs_embeds)

    net = TwoSequences()
    batch = {"inputs_embeds": torch.zeros(2, 3, 4), "attention_mask": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="first calibration batch has no token that counts"):
        discover(Runner(net, targets_of(net, "layer")), batch)
