"""Every batch that the model runs on is calibrated on as the model is trained on it."""

import pytest
import torch
import transformers
from torch import nn

from peft_corda import CordaConfig, calibrate
from peft_corda.base_model.forward import Runner
from peft_corda.base_model.targets import find_targets
from tests.helpers.corda import covariances_of, make_batches, make_config, make_model
from tests.helpers.two_sided import (
    TWO_SIDED,
    source_and_targets,
    tiny_llava,
    two_sided,
    with_images,
)


def tokens_of(model, batches, *names, targets="all-linear"):
    """Number of tokens that the first module with each of the names was calibrated on."""
    config = CordaConfig(r=1, corda_method="kpm", target_modules=targets)
    modules = calibrate(model, config, batches, progress=False).modules
    return [next(m.tokens for key, m in modules.items() if name in key) for name in names]


def inputs_in_training(model, batch, names):
    """What modules are given by a plain call of the model."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].detach())
        )
        for name in names
    ]
    with torch.no_grad():
        assert model(**batch).loss is not None
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("left_out", ["nowhere", "end", "start", "middle"])
@pytest.mark.parametrize("kind", list(TWO_SIDED))
def test_a_decoder_sees_the_labels_moved_on(kind, left_out):
    model, batch = two_sided(kind), source_and_targets(kind, left_out)
    decoder = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and "decoder" in name
        and name.endswith((".q", ".wi", ".self_attn.q_proj", ".fc1"))
    ]
    assert len(decoder) >= 2
    cross = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.endswith(("EncDecAttention.k", "encoder_attn.k_proj"))
    ]
    targets = {name: model.get_submodule(name) for name in decoder + cross}
    found = covariances_of(model, targets, [batch])
    given = inputs_in_training(model, batch, decoder)
    counts = batch["labels"] != -100
    for name in decoder:
        rows = given[name][counts]
        assert found[name].tokens == len(rows), name
        torch.testing.assert_close(
            found[name].matrix, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4
        )
    for name in cross:
        assert found[name].tokens == (
            60 if kind == "whisper" else int(batch["attention_mask"].sum())
        )


def test_padding_of_targets_without_minus_100():
    model, batch = two_sided("t5"), source_and_targets("t5", "end")
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, 0)
    assert tokens_of(model, [batch], "encoder", "decoder", targets=["q"]) == [19, 18]


def test_labels_beside_decoder_inputs_tell_its_padding():
    model, batch = two_sided("t5"), source_and_targets("t5", "end")
    made = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    found = tokens_of(model, [batch | {"decoder_input_ids": made}], "decoder", targets=["q"])
    assert found == [18]


@pytest.mark.parametrize("head", ["BartForSequenceClassification", "T5ForSequenceClassification"])
def test_classes_are_no_targets(head):
    config = two_sided("bart" if head[0] == "B" else "t5").config
    config.num_labels = 3
    model = getattr(transformers, head)(config).eval()
    ids = torch.randint(4, 59, (3, 9))
    ids[:, -1] = config.eos_token_id
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 2])}
    assert tokens_of(model, [batch], "decoder", targets=r".*\.(q|q_proj)") == [27]


def test_sound_of_as_many_frames_as_targets():
    batch = source_and_targets("whisper", "start", length=20)
    with pytest.raises(ValueError, match="cannot be told from a decoder's"):
        tokens_of(two_sided("whisper"), [batch], "decoder")


@pytest.mark.parametrize("padded", ["right", "left"])
@pytest.mark.parametrize("images", [[1, 1], [2, 1], [2, 0], [0, 2], [1, 2, 0]])
def test_images_stay_with_their_rows(images, padded):
    model, batch = tiny_llava(), with_images(images, padded)
    tokens = int(batch["attention_mask"].sum())
    # Each image is 4 patches and one more of the class.
    assert tokens_of(model, [batch], "language_model", "vision_tower") == [tokens, 5 * sum(images)]


def test_images_in_rows_of_patches():
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=60, vision_start_token_id=62
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    ids = torch.randint(3, 59, (2, 16))
    for row, start in [(0, 1), (0, 7), (1, 1)]:  # two images in one row
        ids[row, start], ids[row, start + 1 : start + 5] = 62, 60
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(3 * 16, 3 * 2 * 16),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 3),
    }
    if transformers.__version__ >= "5":
        batch["mm_token_type_ids"] = (ids == 60).long()
    assert tokens_of(model, [batch], "language_model", "visual") == [29, 48]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_positions_for_all_rows(kind, side):
    model, (batch,) = make_model(kind), make_batches(1)
    batch["attention_mask"][1, 8:] = 0
    if side == "left":
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    positions = torch.arange(12)[None]
    targets = find_targets(model, make_config(kind, r=2))
    found = covariances_of(model, targets, [{**batch, "position_ids": positions}])
    expected = covariances_of(model, targets, [{**batch, "position_ids": positions.repeat(4, 1)}])
    for name, covariance in found.items():
        assert covariance.tokens == expected[name].tokens > 0
        torch.testing.assert_close(covariance.matrix, expected[name].matrix)


def test_multiple_choice():
    config = make_model("bert").config
    model = transformers.BertForMultipleChoice(config).eval()
    ids = torch.randint(3, 90, (3, 2, 8))
    mask = torch.ones_like(ids)
    mask[0, 0, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(3).long()}
    assert tokens_of(model, [batch], "query", targets=["query"]) == [45]


def test_labels_that_the_forward_needs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, labels):
            return self.layer(x[labels])

    batch = {"x": torch.randn(5, 4), "labels": torch.tensor([0, 3])}
    assert tokens_of(Net(), [batch], "layer", targets=["layer"]) == [2]


def test_a_batch_is_not_taken_apart_where_rows_are_not_certain():
    ids = torch.arange(12).reshape(3, 4)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 0]] + [[1] * 4] * 2)}
    runner = Runner(make_model("llama"), {}, without_padding=True)
    assert len(runner.parts(batch)) == 2
    for more in (
        {"pixel_values": torch.zeros(4, 3, 8, 8)},
        {"position_ids": torch.zeros(3, 3, 4)},
        {"names": ["a", "b", "c"]},
        {"image_grid_thw": torch.ones(1, 3)},
    ):
        (part,) = runner.parts(batch | more)
        assert part.keys() == (batch | more).keys()
