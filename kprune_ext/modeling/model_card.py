"""Section on the pruning in a model card (README.md)."""

from __future__ import annotations

import os

from huggingface_hub import ModelCard, ModelCardData

from ..common.presentation import CARD_NAME, with_section
from ..report.report import KPruneReport

_OWNER = "kprune_ext"
_TEXT = """\
## Pruned with K-prune

Attention heads and feed-forward neurons were removed with
[K-prune](https://arxiv.org/abs/2308.03449). Each layer keeps:

{table}

{loading}
"""
_PLUGIN = """\
transformers needs a plugin to load it. Run `pip install peft-corda`, then

```python
import kprune_ext  # before the model is loaded
from transformers import {auto}

model = {auto}.from_pretrained("path or hub id")
```"""
_SELF_CONTAINED = """\

Without the plugin, pass `trust_remote_code=True` in place of the import. This runs `{file}` of this
repository, so read the file first."""


def pruning_section(report: KPruneReport, auto: str, modeling_file: str | None) -> str:
    """Returns the section, with the units kept and instructions for loading the model.

    Args:
        report: Report of the pruning.
        auto: Name of transformers' Auto class that loads the model.
        modeling_file: Name of the modelling file beside the weights, or None.
    """
    loading = _PLUGIN.format(auto=auto)
    if modeling_file is not None:
        loading += "\n" + _SELF_CONTAINED.format(file=modeling_file)
    return _TEXT.format(table=report.markdown(), loading=loading)


def card_text(folder: str | os.PathLike[str], section: str) -> str:
    """Returns the folder's card, or a new one, with the section."""
    path = os.path.join(folder, CARD_NAME)
    if not os.path.isfile(path):
        return new_card(section)
    # Keep line breaks as they are: the text is the user's.
    with open(path, encoding="utf-8", newline="") as file:
        return with_section(file.read(), section, _OWNER)


def new_card(section: str) -> str:
    """Returns a card with only the section."""
    data = ModelCardData(library_name="transformers", tags=["kprune"])
    return with_section(f"---\n{data.to_yaml()}\n---\n\n# Pruned model", section, _OWNER)


def remote_card(repo_id: str, section: str, token: str | bool | None) -> str:
    """Returns the card of a repository on the hub, or a new one, with the section."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        card = ModelCard.load(repo_id, token=token)  # type: ignore[arg-type]
    except EntryNotFoundError:
        return new_card(section)
    return with_section(str(card), section, _OWNER)
