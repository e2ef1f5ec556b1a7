"""The part of a model card (README.md) that is about the adapter."""

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

PEFT needs a plugin for this adapter; without it, loading ends in `KeyError: 'CORDA'`. The fix:

```bash
pip install peft-corda
```

```python
import peft_corda  # before the adapter is loaded
```

- Method: CorDA ([arXiv 2406.05223](https://arxiv.org/abs/2406.05223)), {method}.
- Rank: {rank}.
- `lora_A0` and `lora_B0` are what `lora_A` and `lora_B` started from. The adapter adds the difference,
  `s (B A − B0 A0)`, to the unchanged weights of the base model.
- `peft-corda export` turns it into a plain LoRA adapter, which needs no plugin.
"""
_MEANINGS = {
    "kpm": "`kpm`: trained are the directions that the calibration data uses least",
    "ipm": "`ipm`: trained are the directions that the calibration data uses most",
    None: "but no method was named and no data given: trained from the start of a plain LoRA",
}
_LORA = """\
## Plain LoRA

Trained as a CorDA adapter ({method}, rank {rank}) and exported by peft-corda as a LoRA adapter of rank
{exported}{how}. It loads on the unchanged base model with PEFT alone.
"""


@dataclass(frozen=True)
class AdapterFacts:
    """What a card says of an adapter.

    Attributes:
        method: `"kpm"`, `"ipm"`, or None where no method was named.
        ranks: All ranks that modules have.
        base_model: Name or path of the base model, if known.
    """

    method: str | None
    ranks: frozenset[int]
    base_model: str | None

    @property
    def rank(self) -> str:
        """The rank, or the least and the largest one."""
        least, largest = min(self.ranks), max(self.ranks)
        return str(least) if least == largest else f"{least} to {largest}"


def corda_section(facts: AdapterFacts) -> str:
    """What to do where the plugin is missing, and what the adapter is."""
    return _CORDA.format(method=_MEANINGS[facts.method], rank=facts.rank)


def update_card(folder: str | os.PathLike[str], section: str | None) -> None:
    """Put our section into a card that is there, in place of an older one, or take it out (None)."""
    path = os.path.join(folder, CARD_NAME)
    if not os.path.isfile(path):
        return
    # Line breaks as they are: the text is the user's.
    with open(path, encoding="utf-8", newline="") as file:
        before = file.read()
    after = with_section(before, section, _OWNER)
    if after != before:
        _write(path, after)


def describe(folder: str | os.PathLike[str], facts: AdapterFacts) -> None:
    """Put a section on the adapter into the card, after PEFT wrote card and weights.

    For adapters in folders of their own, PEFT writes one card above them; theirs are made here. Without
    weights it is no checkpoint, and no card is made.
    """
    path = os.path.join(folder, CARD_NAME)
    weights = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if os.path.isfile(path):
        update_card(folder, corda_section(facts))
    elif any(os.path.isfile(os.path.join(folder, name)) for name in weights):
        _write(path, with_section(_new_card(facts), corda_section(facts), _OWNER))


def lora_card(src: str, dst: str, facts: AdapterFacts, rank: int, exact: bool) -> str:
    """The card of an export: that of an earlier export or of the checkpoint, as far as it goes on."""
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
