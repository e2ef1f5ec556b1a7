"""Cards that are damaged, or cannot be replaced: models are saved, and no text of the user is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from kprune_ext.checkpoint_files import model_card
from tests.helpers.kprune_checkpoints import batch, load

REPORT = "kprune_report.json"


def test_a_card_that_is_no_text_keeps_its_bytes(pruned, tmp_path, caplog) -> None:
    mine = "# Größe\r\n".encode("latin-1") + b"\x00\xfe\n"
    (tmp_path / "README.md").write_bytes(mine)
    for _ in range(2):
        pruned.save_pretrained(tmp_path)
        written = (tmp_path / "README.md").read_bytes()
        assert written.startswith(mine) and written.count(b"kprune_ext: start") == 1
    assert "is not text in UTF-8. Its bytes are kept" in caplog.text


def test_a_card_with_half_a_section_loses_no_text(pruned, tmp_path) -> None:
    mine = "<!-- kprune_ext: start -->\n# Mine\nText\n"
    (tmp_path / "README.md").write_text(mine)
    for _ in range(2):
        pruned.save_pretrained(tmp_path)
        written = (tmp_path / "README.md").read_text()
        assert written.startswith(mine) and written.count("kprune_ext: end") == 1


@pytest.mark.parametrize("name", ["README.md", REPORT])
def test_folders_in_place_of_files(name: str, pruned, tmp_path, caplog) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    pruned.save_pretrained(tmp_path)
    assert f"{name} is not written, as there is a folder of that name" in caplog.text
    assert (tmp_path / name / "mine.txt").read_text() == "mine"
    assert torch.equal(load(tmp_path)(**batch()).logits, pruned(**batch()).logits)


def test_a_damaged_card_on_the_hub(pruned, tmp_path, monkeypatch, caplog) -> None:
    card = tmp_path / "card.md"
    card.write_bytes(b"---\nlicense: [mit\n---\n# Remote \xff\n")
    monkeypatch.setattr(
        ModelCard, "load", classmethod(lambda *_, **__: ModelCard(card.read_text()))
    )
    monkeypatch.setattr(model_card, "hf_hub_download", lambda *_, **__: str(card))
    text = model_card.remote_card("me/name", "SECTION\n", None)
    model_card.write_card(tmp_path / "out.md", text)
    assert b"# Remote \xff\n" in (tmp_path / "out.md").read_bytes() and "SECTION" in text
    assert "The card of me/name is damaged" in caplog.text

    def missing(*_: Any, **__: Any) -> None:
        raise EntryNotFoundError("none")

    monkeypatch.setattr(ModelCard, "load", classmethod(missing))
    assert "# Pruned model" in model_card.remote_card("me/name", "SECTION\n", None)
