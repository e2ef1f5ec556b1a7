"""A pruned model for the tests of its checkpoints."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from kprune_ext import KPruneConfig, kprune
from tests.helpers.kprune import padded, sequences, tiny_bert


@pytest.fixture(scope="module")
def layout(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", "free")


@pytest.fixture(scope="module")
def pruned(layout: str) -> PreTrainedModel:
    # Equal layers of an encoder keep their heads, and so more of it.
    config = KPruneConfig(reduction=0.5 if layout == "free" else 0.25, layout=layout)
    return kprune(tiny_bert(), padded(sequences()), config, progress=False)
