"""Settings shared by all tests: no network, fixed seeds, one thread (tiny tensors gain from none)."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_DISABLED"] = "true"

import pytest
import torch
from transformers import set_seed

torch.set_num_threads(1)


# Folders whose files take long come first, and those of many short tests last: several processes, which
# take one file after the other, then end at about the same time.
_FIRST = ("end_to_end", "distributed", "benchmarks", "compatibility")
_LAST = ("reference", "device", "house")


def pytest_collection_modifyitems(items):
    def place(item):
        folder = Path(item.path).relative_to(Path(__file__).parent).parts[0]
        return 0 if folder in _FIRST else 2 if folder in _LAST else 1

    items.sort(key=place)


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
