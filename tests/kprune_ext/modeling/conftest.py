"""A pruned model for the tests of its checkpoints."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from kprune_ext import KPruneConfig, kprune
from tests.helpers.kprune import padded, sequences, tiny_bert


@pytest.fixture(scope="module")
def pruned() -> PreTrainedModel:
    return kprune(tiny_bert(), padded(sequences()), KPruneConfig(reduction=0.5), progress=False)
