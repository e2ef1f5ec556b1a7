"""Modules that have the same input share one covariance; those that only seem to do not."""

import pytest
import torch
from torch import nn

from peft_corda.base_model.targets import find_targets
from tests.helpers.corda import covariances_of, make_batches, make_config, make_model


def test_modules_with_the_same_input_share_one_covariance():
    model = make_model("llama")
    targets = find_targets(model, make_config())
    found = covariances_of(model, targets, make_batches())
    layer = "model.layers.0."
    q, k, v, o = (found[f"{layer}self_attn.{name}_proj"] for name in "qkvo")
    gate, up, down = (found[f"{layer}mlp.{name}_proj"] for name in ("gate", "up", "down"))
    assert q is k is v and gate is up
    assert len({id(c) for c in (q, o, gate, down)}) == 4


def test_input_changed_in_place_is_not_taken_for_the_same():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = x.clone()
            y = self.first(x)
            x.mul_(3)
            return y + self.second(x)

    net = Net()
    targets = {"first": net.first, "second": net.second}
    found = covariances_of(net, targets, [{"x": torch.randn(5, 6)}])
    torch.testing.assert_close(found["second"].matrix, 9 * found["first"].matrix)


class SometimesShared(nn.Module):
    """Gives its two layers the same tensor, or equal ones."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, copied):
        return self.first(x) + self.second(x.clone() if copied else x)


def test_input_found_to_be_shared_later_is_counted_for_each():
    net, x = SometimesShared(), torch.randn(5, 6)
    found = covariances_of(
        net,
        {"first": net.first, "second": net.second},
        [{"x": x, "copied": True}, {"x": x, "copied": False}],
    )
    assert found["first"].tokens == found["second"].tokens == 10
    assert torch.equal(found["first"].matrix, found["second"].matrix)


def test_modules_that_share_their_input_only_sometimes_are_refused():
    net, x = SometimesShared(), torch.randn(5, 6)
    with pytest.raises(ValueError, match="second had the same input as first in one batch but not"):
        covariances_of(
            net,
            {"first": net.first, "second": net.second},
            [{"x": x, "copied": False}, {"x": x, "copied": True}],
        )
