"""The model card (README.md) of an adapter: a short card, and the section on CorDA."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from yaml import YAMLError

from kprune_ext.files.presentation import CARD_NAME, how_to_install, with_section
from kprune_ext.files.writing import replacing

_OWNER = "peft_corda"
#: The hub's names for what models of PEFT's task types do.
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
#: Lines that PEFT adds to its template.
_PEFT_LINE = re.compile(
    r"### Framework versions$|- [\w ]+(: .*| [\d.]\S*)$|The following `bitsandbytes`"
)
_CORDA = """\
## CorDA adapter

PEFT needs a plugin to load this adapter; without it, loading fails with `KeyError: 'CORDA'`. Install
the plugin:

{install}

and import it:

```python
import peft_corda  # before the adapter is loaded
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or hub id of this adapter")
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
        task: PEFT's task type, if known.
    """

    method: str | None
    ranks: frozenset[int]
    base_model: str | None
    task: str | None = None

    @property
    def rank(self) -> str:
        """The rank, or the smallest and the largest one."""
        least, largest = min(self.ranks), max(self.ranks)
        return str(least) if least == largest else f"{least} to {largest}"


def corda_section(facts: AdapterFacts) -> str:
    """Returns the section on the adapter, with instructions for installing the plugin."""
    return _CORDA.format(method=_MEANINGS[facts.method], rank=facts.rank, install=how_to_install())


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

    PEFT's template, which asks the author to fill it in, becomes a short card; a card that someone has
    edited keeps its text. For adapters in their own subfolders, PEFT writes only one card, in the
    parent folder; theirs are created here. A folder without weights is not a checkpoint, and gets no
    card.
    """
    path = os.path.join(folder, CARD_NAME)
    weights = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if os.path.isfile(path):
        shorten(path, facts)
        update_card(folder, corda_section(facts))
    elif any(os.path.isfile(os.path.join(folder, name)) for name in weights):
        _write(path, with_section(_new_card(facts, "corda"), corda_section(facts), _OWNER))


def shorten(path: str, facts: AdapterFacts) -> None:
    """Completes the metadata that PEFT has just written, and replaces its template by a title.

    A text that someone has edited is kept.
    """
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    try:
        card = ModelCard(text)
    except (ValueError, YAMLError):
        return
    tags = card.data.get("tags") or []
    card.data["tags"] = sorted({*([tags] if isinstance(tags, str) else tags), "corda"})
    pipeline = _PIPELINES.get(facts.task or "")
    if pipeline is not None and not card.data.get("pipeline_tag"):
        card.data["pipeline_tag"] = pipeline
    if not card.data.get("base_model"):
        card.data["base_model"] = None  # left out of the file
    added = _added_to_template(card.text)
    if added is not None:
        card.text = "\n" + "\n".join([_title(facts), "", *added]).rstrip() + "\n"
    after = str(card)
    if after != text:
        _write(path, after)


def _added_to_template(text: str) -> list[str] | None:
    """Returns what PEFT has added to its template; None if the text is no longer the template."""
    template = Counter(ModelCard.from_template(ModelCardData()).text.splitlines())
    added, seen = [], Counter[str]()
    for line in text.splitlines():
        seen[line] += 1
        if seen[line] > template[line]:
            if line.strip() and not _PEFT_LINE.match(line):
                return None
            added.append(line)
    if any(seen[line] < count for line, count in template.items() if line.strip()):
        return None
    return [line for line in added if line.strip()]


def lora_card(src: str, dst: str, facts: AdapterFacts, rank: int, exact: bool) -> str:
    """Returns the card of an export, based on that of an earlier export or of the checkpoint.

    The section on the CORDA adapter is replaced by one on the exported LoRA.
    """
    cards = [os.path.join(folder, CARD_NAME) for folder in (dst, src)]
    found = next(filter(os.path.isfile, cards), None)
    card = ModelCard.load(found) if found is not None else ModelCard(_new_card(facts, "lora"))
    card.data["library_name"] = "peft"
    tags = card.data.get("tags") or []
    card.data["tags"] = sorted({*([tags] if isinstance(tags, str) else tags), "lora"})
    how = "" if exact else ", the best approximation of that rank"
    method = f"`{facts.method}`" if facts.method else "no method"
    section = _LORA.format(method=method, rank=facts.rank, exported=rank, how=how)
    return with_section(str(card), section, _OWNER)


def _new_card(facts: AdapterFacts, tag: str) -> str:
    data = ModelCardData(
        base_model=facts.base_model,
        library_name="peft",
        pipeline_tag=_PIPELINES.get(facts.task or ""),
        tags=[tag],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_title(facts)}\n"


def _title(facts: AdapterFacts) -> str:
    name = os.path.basename(os.path.normpath(facts.base_model)) if facts.base_model else ""
    return f"# Adapter for {name}" if name else "# Adapter"


def _write(path: str, text: str) -> None:
    with replacing(path) as new, open(new, "w", encoding="utf-8", newline="") as file:
        file.write(text)
