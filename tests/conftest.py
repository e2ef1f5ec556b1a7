"""Settings shared by all tests: no network, fixed seeds, one thread (tiny tensors gain from none)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_DISABLED"] = "true"

import pytest
import torch
from transformers import set_seed

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    set_seed(0)


@pytest.fixture(autouse=True)
def _no_state_left_behind():
    """Fails a test that leaves the process computing differently."""
    from tests.helpers.process import state_kept

    with state_kept():
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a causal language model and its tokenizer."""
    from tests.helpers.text import save_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return str(folder)
