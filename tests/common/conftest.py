"""A folder of inputs, and a user's folder that no test may change."""

import pytest
from peft import get_peft_model

from peft_corda import calibrate
from tests.helpers.corda import make_batches, make_config, make_model
from tests.helpers.destinations import contents
from tests.helpers.text import SENTENCES, make_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model with a tokenizer, data, factors and a trained adapter."""
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer().save_pretrained(folder / "llama")
    model, config = make_model("llama"), make_config()
    model.save_pretrained(folder / "llama")
    (folder / "data.txt").write_text("\n".join(SENTENCES))
    calibrate(model, config, make_batches(), verbose=False).save(folder / "factors.safetensors")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The current folder, with a user's work in it; it must be as it was at the end."""
    here = tmp_path / "project"
    (here / "thesis").mkdir(parents=True)
    (here / "thesis" / "chapter1.tex").write_text("years of work")
    (here / "data.csv").write_text("1")
    monkeypatch.chdir(here)
    before = contents(here)
    yield here
    assert contents(here) == before
