"""The section of a model card (README.md) about the adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from kprune_ext.common.files import replacing
from kprune_ext.common.presentation import CARD_NAME, with_section

_OWNER = "peft_corda"
_CORDA = """\
## CorDA adapter

PEFT needs a plugin to load this adapter; without it, loading fails with `KeyError: 'CORDA'`. Install
the plugin:

```bash
pip install peft-corda
```

and import it:

```python
import peft_corda  # before the adapter is loaded
```

- Method: CorDA ([arXiv 2406.05223](https://arxiv.org/abs/2406.05223)), {method}.
- Rank: {rank}.
- `lora_start_A` and `lora_start_B` are the start `A0`, `B0` of the adapter; `lora_A` and `lora_B` are
  the changes from it, `A − A0` and `B − B0`. The adapter adds `s (B A − B0 A0)` to the unchanged
  weights of the base model. It needs peft-corda 0.2 or later.
- `peft-corda export` converts it to a plain LoRA adapter, which needs no plugin.
"""
_MEANINGS = {
    "kpm": "`kpm`, which trains the directions that the calibration data uses least",
    "ipm": "`ipm`, which trains the directions that the calibration data uses most",
    "sc_lora": "`sc_lora`, which trains directions that a task uses and the data to keep does not "
    "(SC-LoRA, arXiv 2505.23724)",
    "lora_null": "`lora_null`, which trains the part of the weights that the inputs of the calibration "
    "data hardly reach (LoRA-Null, arXiv 2503.02659)",
    None: "without a method or calibration data: trained from the initialization of a plain LoRA",
}
_LORA = """\
## Plain LoRA

This adapter was trained as a CorDA adapter ({method}, rank {rank}) and exported by peft-corda as a
LoRA adapter of rank {exported}{how}. PEFT alone loads it on the unchanged base model.
"""


@dataclass(frozen=True)
class AdapterFacts:
    """Facts about an adapter that a model card states.

    Attributes:
        method: The method, or None if none was given.
        ranks: All ranks that modules have.
        base_model: Name or path of the base model, if known.
    """

    method: str | None
    ranks: frozenset[int]
    base_model: str | None

    @property
    def rank(self) -> str:
        """The rank, or the smallest and the largest one."""
        least, largest = min(self.ranks), max(self.ranks)
        return str(least) if least == largest else f"{least} to {largest}"


def corda_section(facts: AdapterFacts) -> str:
    """Returns the section on the adapter, with instructions for installing the plugin."""
    return _CORDA.format(method=_MEANINGS[facts.method], rank=facts.rank)


def update_card(folder: str | os.PathLike[str], section: str | None) -> None:
    """Adds or replaces our section in an existing card, or removes it (None)."""
    path = os.path.join(folder, CARD_NAME)
    if not os.path.isfile(path):
        return
    # Line breaks are kept, as the text is the user's.
    with open(path, encoding="utf-8", newline="") as file:
        before = file.read()
    after = with_section(before, section, _OWNER)
    if after != before:
        _write(path, after)


def describe(folder: str | os.PathLike[str], facts: AdapterFacts) -> None:
    """Adds a section on the adapter to the card, after PEFT has written the card and the weights.

    For adapters in their own subfolders, PEFT writes only one card, in the parent folder; theirs are
    created here. A folder without weights is not a checkpoint, and gets no card.
    """
    path = os.path.join(folder, CARD_NAME)
    weights = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if os.path.isfile(path):
        update_card(folder, corda_section(facts))
    elif any(os.path.isfile(os.path.join(folder, name)) for name in weights):
        _write(path, with_section(_new_card(facts), corda_section(facts), _OWNER))


def lora_card(src: str, dst: str, facts: AdapterFacts, rank: int, exact: bool) -> str:
    """Returns the card of an export, based on that of an earlier export or of the checkpoint.

    The section on the CORDA adapter is replaced by one on the exported LoRA.
    """
    cards = [os.path.join(folder, CARD_NAME) for folder in (dst, src)]
    found = next(filter(os.path.isfile, cards), None)
    card = ModelCard.load(found) if found is not None else ModelCard(_new_card(facts))
    card.data["library_name"] = "peft"
    tags = card.data.get("tags") or []
    card.data["tags"] = sorted({*([tags] if isinstance(tags, str) else tags), "lora"})
    how = "" if exact else ", the best approximation of that rank"
    method = f"`{facts.method}`" if facts.method else "no method"
    section = _LORA.format(method=method, rank=facts.rank, exported=rank, how=how)
    return with_section(str(card), section, _OWNER)


def _new_card(facts: AdapterFacts) -> str:
    data = ModelCardData(base_model=facts.base_model, library_name="peft")
    return f"---\n{data.to_yaml()}\n---\n\n# Adapter\n"


def _write(path: str, text: str) -> None:
    with replacing(path) as new, open(new, "w", encoding="utf-8", newline="") as file:
        file.write(text)
