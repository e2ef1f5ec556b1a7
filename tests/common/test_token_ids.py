"""Token ids of another model's tokenizer are an error that says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kprune_ext import KPruneConfig, kprune
from kprune_ext.common.data.token_ids import require_known_tokens
from peft_corda import CordaConfig, calibrate
from tests.helpers import kprune as encoders
from tests.helpers.corda import tiny_llama
from tests.helpers.kprune_decoders import tiny_decoder
from tests.helpers.two_sided import tiny_llava

FOREIGN = {"input_ids": torch.tensor([[3, 4, 100_000]]), "attention_mask": torch.ones(1, 3)}
NEGATIVE = FOREIGN | {"input_ids": torch.tensor([[3, 4, -100]])}
KNOWN = FOREIGN | {"input_ids": torch.tensor([[3, 4, 5]])}


@pytest.mark.parametrize("batch", [FOREIGN, NEGATIVE])
@pytest.mark.parametrize(
    "model", [encoders.tiny_bert, lambda: tiny_decoder("llama"), lambda: tiny_decoder("gpt2")]
)
def test_kprune_refuses_them(model, batch) -> None:
    with pytest.raises(ValueError, match="Use the tokenizer of this model"):
        kprune(model(), [KNOWN, batch], KPruneConfig(reduction=0.5), progress=False)


@pytest.mark.parametrize("batch", [FOREIGN, NEGATIVE])
def test_calibrate_refuses_them(batch) -> None:
    config = CordaConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="token id -?100.*rows"):
        calibrate(tiny_llama(), config, [KNOWN, batch], progress=False)


def test_what_cannot_be_told_is_not_checked() -> None:
    require_known_tokens(nn.Linear(2, 2), FOREIGN["input_ids"])
    require_known_tokens(tiny_llava(), FOREIGN["input_ids"])  # ids may stand for images
    model = encoders.tiny_bert()
    for ids in (None, [[100_000]], torch.zeros(0, 3, dtype=torch.long), torch.ones(1, 2) * 1e6):
        require_known_tokens(model, ids)
    last = model.get_input_embeddings().num_embeddings - 1
    require_known_tokens(model, torch.tensor([[0, last]]))
    with pytest.raises(ValueError, match=f"id {last + 1}, .* ids 0 to {last}"):
        require_known_tokens(model, torch.tensor([[last + 1]]))
