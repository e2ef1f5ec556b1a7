"""Pruned models that the family's own config can describe: as large in every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from kprune_ext.modeling.copying import record_kept, uneven_copy
from kprune_ext.units.kept import plain_settings
from tests.helpers.kprune import tiny_bert
from tests.helpers.kprune_decoders import (
    DECODERS,
    TASK_CLASSES,
    cut,
    equal_texts,
    tiny_decoder,
)
from tests.helpers.kprune_models import outputs_of

#: Families whose config has no number of heads that is independent of the hidden size.
_ALL_HEADS = {"gpt2", "opt", "opt with norms after"}


@pytest.mark.parametrize("family", DECODERS)
def test_transformers_alone_builds_and_loads_it(family: str) -> None:
    model = tiny_decoder(family)
    groups = [[0, 1, 2]] * 3 if family in _ALL_HEADS else [[0, 2], [1, 2], [0, 1]]
    neurons = [[0, 4, 9, 11], [1, 2, 3, 4], [5, 7, 12, 19]]
    pruned = cut(model, list(zip(groups, neurons, strict=True)))
    settings = plain_settings(pruned.config)
    assert settings is not None
    given = {**DECODERS[family][1], **settings}
    config = AutoConfig.for_model(DECODERS[family][0], **given)
    plain: Any = TASK_CLASSES["language"].from_config(config).eval()
    assert type(plain) is type(model)
    plain.load_state_dict(pruned.state_dict())
    batch = equal_texts()
    assert torch.equal(outputs_of(plain, batch)[0], outputs_of(pruned, batch)[0])


@pytest.mark.parametrize("family", DECODERS)
def test_uneven_or_empty_layers_have_no_plain_settings(family: str) -> None:
    model = tiny_decoder(family)
    whole = [([0, 1, 2], list(range(20)))] * 3
    assert plain_settings(cut(model, whole).config) == {}
    for kept in (
        [([0], [1, 2]), ([0], [1, 2]), ([0], [1])],
        [([0], [1]), ([0], [1]), ([0, 1], [1])],
        [([], [1])] * 3,
        [([0, 1, 2], [])] * 3,
    ):
        assert plain_settings(cut(model, kept).config) is None
    one_group = plain_settings(cut(model, [([1], [2])] * 3).config)
    assert (one_group is None) == (family in _ALL_HEADS)


def test_an_encoder_can_name_its_neurons_but_not_its_heads() -> None:
    pruned = uneven_copy(tiny_bert())
    record_kept(pruned, [([0, 1, 2, 3], [1, 2])] * 2)
    assert plain_settings(pruned.config) == {"intermediate_size": 2}
    record_kept(pruned, [([0, 1], [0, 1])] * 2)
    assert plain_settings(pruned.config) is None
