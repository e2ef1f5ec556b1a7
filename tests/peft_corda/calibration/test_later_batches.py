"""What the first batch does not reach is calibrated on the batches that do."""

import pytest
import torch
from torch import nn

from peft_corda import CordaConfig, calibrate
from tests.helpers.corda import bytes_of
from tests.helpers.two_sided import tiny_llava, with_images


class Experts(nn.Module):
    """Eight experts, each called with the tokens that it is best for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.gate = nn.Embedding(64, 16), nn.Linear(16, 8, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
        self.runs = 0

    def forward(self, input_ids, attention_mask=None):
        self.runs += 1
        tokens = self.embedding(input_ids).flatten(0, 1)
        best = self.gate(tokens).argmax(-1)
        return [
            expert(tokens[best == i]) for i, expert in enumerate(self.experts) if (best == i).any()
        ]


class Late(nn.Module):
    """Blocks in a chain; after some of them, pictures are added where there are any."""

    def __init__(self, side=6, blocks=16, pictures_after=12):
        super().__init__()
        self.pictures_after = pictures_after
        torch.manual_seed(0)
        self.embedding, self.picture = nn.Embedding(64, side), nn.Linear(side, side)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(side, side)) for _ in range(blocks))

    def forward(self, input_ids, pixel_values=None):
        hidden = self.embedding(input_ids)
        for number, block in enumerate(self.blocks):
            hidden = block(hidden)
            for picture in (
                () if pixel_values is None or number > self.pictures_after else pixel_values
            ):
                hidden = hidden + self.picture(picture)
        return hidden


def experts_config():
    return CordaConfig(r=2, corda_method="kpm", target_modules=r"experts\.\d+")


def tokens_for(*lengths):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (1, 120), generator=generator)
    return [{"input_ids": ids[:, :length]} for length in lengths]


@pytest.mark.parametrize("padded", [False, True])
def test_experts_of_the_second_batch(padded):
    batches = tokens_for(4, 120)
    if padded:
        for batch in batches:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][:, -1] = 0
    model, counted = Experts(), 0
    kept = torch.cat([b["input_ids"][0, : b["input_ids"].shape[1] - padded] for b in batches])
    best = model.gate(model.embedding(kept)).argmax(-1)
    factors = calibrate(model, experts_config(), batches, progress=False)
    for number in range(8):
        counted += factors.modules[f"experts.{number}"].tokens
        assert factors.modules[f"experts.{number}"].tokens == int((best == number).sum())
    assert counted == len(kept)


def test_several_passes_give_what_one_gives():
    batches = tokens_for(4, 5, 120)
    whole = bytes_of(calibrate(Experts(), experts_config(), batches, progress=False))
    for limit in (1024, 3000):  # one and two experts at a time
        parts = calibrate(Experts(), experts_config(), batches, limit, progress=False)
        assert bytes_of(parts) == whole


def test_no_more_batches_are_looked_at_than_it_takes():
    for lengths, runs in [((120, 4, 4), 2), ((4, 120, 4), 3)]:
        model, batches = Experts(), tokens_for(*lengths)
        calibrate(model, experts_config(), batches, progress=False)
        # An example or two of the first batch, and each batch in the pass.
        assert model.runs - len(batches) == runs


def test_module_that_no_batch_reaches():
    model = Experts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"experts\.\d \(\d in all\) was never .* of the 2 batches"
    ):
        calibrate(model, experts_config(), tokens_for(2, 3), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("limit", [None, 2**15])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_vision_tower_of_batches_of_text_and_of_images(order, limit):
    kinds = [with_images([0, 0]), with_images([1, 1]), with_images([2, 1])]
    batches = [kinds[number] for number in order]
    config = CordaConfig(r=4, corda_method="kpm", target_modules="all-linear")
    modules = calibrate(tiny_llava(), config, batches, limit, progress=False).modules
    assert {m.tokens for name, m in modules.items() if "vision_tower" in name} == {25}
    assert {m.tokens for name, m in modules.items() if "language_model" in name} == {78}
    assert {m.tokens for name, m in modules.items() if "projector" in name} == {20}


def late_batches():
    text = {"input_ids": torch.arange(3, 15).reshape(2, 6)}
    pictures = torch.randn(3, 1, 1, 6, generator=torch.Generator().manual_seed(4))
    return [text, text | {"pixel_values": pictures[:1]}, text | {"pixel_values": pictures}]


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("targets", [r"blocks\.\d+\.0", r"picture|blocks\.\d+\.0"])
def test_blocks_that_later_batches_give_more_to(targets, first):
    """Hidden states in front of a block are not all that it depends on, as the first shows."""
    batches = late_batches()[first:] + late_batches()[:first]
    config = CordaConfig(r=2, corda_method="kpm", target_modules=targets)
    whole = bytes_of(calibrate(Late(), config, batches, progress=False))
    for limit in (1250, 1800):  # hidden states of all batches, and some of the statistics
        assert bytes_of(calibrate(Late(), config, batches, limit, progress=False)) == whole


def test_module_that_later_batches_call_more_often():
    config = CordaConfig(r=2, corda_method="kpm", target_modules=["picture"])
    _, one, three = late_batches()
    model = Late(pictures_after=0)
    assert calibrate(model, config, [one, three], progress=False).tokens == 1 + 3
