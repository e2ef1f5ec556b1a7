"""Small nets whose blocks form a chain, or do not."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden, other=None):
        if isinstance(hidden, tuple):
            hidden = hidden[0]
        return hidden + self.change(hidden) + (0 if other is None else 2 * other)

    def change(self, hidden):
        return self.outer(self.inner(hidden).tanh())


class InPlace(Block):
    def forward(self, hidden):
        return hidden.add_(self.change(hidden))


class Net(nn.Module):
    """Six blocks between two linear layers, and how they are combined."""

    def __init__(self, run, block):
        super().__init__()
        torch.manual_seed(0)
        self.front, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.shared = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(block() for _ in range(6))
        self.run = run

    def forward(self, inputs_embeds):
        return self.head(self.run(self, self.front(inputs_embeds)))


def plain(net, hidden):
    for block in net.blocks:
        hidden = block(hidden)
    return hidden


def skipping(source, target):
    def run(net, hidden):
        outputs = []
        for number, block in enumerate(net.blocks):
            hidden = block(hidden, outputs[source] if number == target else None)
            outputs.append(hidden)
        return hidden

    return run


def in_pairs(net, hidden):
    for block in net.blocks:
        hidden = (block(hidden), torch.zeros(1))
    return hidden[0]


def read_out_of_all(net, hidden):
    total = 0
    for block in net.blocks:
        hidden = block(hidden)
        total = total + hidden
    return total


def with_cache(net, hidden):
    """The last two blocks read what an inner layer before them left behind."""
    cache = {}
    handle = net.blocks[3].inner.register_forward_hook(lambda *seen: cache.update(state=seen[-1]))
    try:
        for number, block in enumerate(net.blocks):
            hidden = block(hidden, cache["state"] if number >= 4 else None)
    finally:
        handle.remove()
    return hidden


def changed_between(net, hidden):
    for block in net.blocks:
        hidden = block(hidden)
        hidden.mul_(0.9)
    return hidden


def twice_around(net, hidden):
    return plain(net, plain(net, hidden))


def through_shared(net, hidden):
    for block in net.blocks:
        hidden = block(hidden)
        net.shared(-hidden)
    return hidden


NOT_CHAINS = {
    "skip from block 0 to block 2": skipping(0, 2),
    "skip after the middle": skipping(3, 5),
    "outputs in pairs": in_pairs,
    "read out of all blocks": read_out_of_all,
    "cache": with_cache,
    "changed between blocks": changed_between,
    "blocks run twice": twice_around,
}
CONFIG = {"target_modules": "front|head|shared|blocks.*(inner|outer)", "r": 2}


def net_and_batches(run, block=Block):
    net = Net(run, block)
    if run is not through_shared:
        del net.shared
    generator = torch.Generator().manual_seed(0)
    return net, [{"inputs_embeds": torch.randn(2, 5, 8, generator=generator)} for _ in range(3)]
