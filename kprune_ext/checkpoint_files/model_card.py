"""Section on the pruning in a model card (README.md)."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from yaml import YAMLError

from ..files.presentation import CARD_NAME, how_to_install, with_section
from ..report.making import is_hub_id
from ..report.quality import size_of
from ..report.report import REPORT_FILE, KPruneReport

logger = logging.getLogger(__name__)
_OWNER = "kprune_ext"
#: The hub's names for what the models of an Auto class do.
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageClassification": "image-classification",
    "AutoModel": "feature-extraction",
}
# Bytes of a card that are no UTF-8 are read and written as they are.
_KEEP = "surrogateescape"
_TEXT = """\
## Pruned with K-prune

{units} and feed-forward neurons were removed with
[K-prune](https://arxiv.org/abs/2308.03449). Each layer keeps:

{table}

{figures}

{loading}
"""
_PLUGIN = """\
transformers needs a plugin to load it:

{install}

Then

```python
import kprune_ext  # before the model is loaded
from transformers import {auto}

model = {auto}.from_pretrained("path or hub id")
```"""
_PLAIN = """\
All layers have the same sizes, so transformers loads it as any other model:

```python
from transformers import {auto}

model = {auto}.from_pretrained("path or hub id")
```

`{report}` lists the units of the original model that are kept."""
_SELF_CONTAINED = """\

Without the plugin, pass `trust_remote_code=True` in place of the import. This runs `{file}` of this
repository, so read the file first."""


def pruning_section(
    report: KPruneReport, auto: str, modeling_file: str | None, *, plain: bool = False
) -> str:
    """Returns the section, with the units kept and instructions for loading the model.

    Args:
        report: Report of the pruning.
        auto: Name of transformers' Auto class that loads the model.
        modeling_file: Name of the modelling file beside the weights, or None.
        plain: Whether transformers alone loads the model.
    """
    loading = (_PLAIN if plain else _PLUGIN).format(
        auto=auto, report=REPORT_FILE, install=how_to_install()
    )
    if modeling_file is not None:
        loading += "\n" + _SELF_CONTAINED.format(file=modeling_file)
    names = {"heads": "Attention heads", "key-value groups": "Key-value groups of attention"}
    units = names[report.attention_units]
    return _TEXT.format(
        units=units, table=report.markdown(), figures=_figures(report), loading=loading
    )


def _figures(report: KPruneReport) -> str:
    lines = [
        f"- FLOPs of the layers: {report.flops / report.flops_before:.1%} of the original.",
        f"- Parameters: {report.parameters:,} of {report.parameters_before:,}.",
    ]
    if report.weight_bytes_before:
        size, before = size_of(report.weight_bytes), size_of(report.weight_bytes_before)
        lines.append(f"- Weights: {size} of {before}.")
    lines += [f"- {line[0].upper()}{line[1:]}." for line in report.figures()]
    return "\n".join(lines)


@dataclass(frozen=True)
class CardFacts:
    """Facts for the metadata of a new card.

    Attributes:
        base_model: Hub id of the model that was pruned, if it is one.
        pipeline: The hub's name for what the model does, if it has one.
        metrics: Names of the measured metrics.
    """

    base_model: str | None = None
    pipeline: str | None = None
    metrics: tuple[str, ...] = ()


def card_facts(name: str, auto: str, report: KPruneReport) -> CardFacts:
    """Returns the facts about a pruned model.

    Args:
        name: Hub id or path that the original was loaded from. A path is left out, because it means
            nothing on another machine.
        auto: Name of transformers' Auto class that loads the model.
        report: Report of the pruning.
    """
    has_accuracy = report.quality is not None and report.quality.accuracy is not None
    known = {"perplexity": report.perplexity is not None, "accuracy": has_accuracy}
    metrics = tuple(name for name, is_known in known.items() if is_known)
    return CardFacts(name if is_hub_id(name) else None, _PIPELINES.get(auto), metrics)


def card_text(
    folder: str | os.PathLike[str], section: str, facts: CardFacts | None = None
) -> str | None:
    """Returns the folder's card, or a new one, with the section; None if it cannot be replaced."""
    path = Path(folder, CARD_NAME)
    if not can_be_replaced(path):
        return None
    if not path.is_file():
        return new_card(section, facts)
    try:
        return with_section(_text_of(path), section, _OWNER)
    except OSError as error:
        logger.warning("%s is left as it is, as it cannot be read: %s", path, error)
        return None


def can_be_replaced(path: Path) -> bool:
    """Whether a file can be written at a path; warns where a folder is in its place."""
    if path.is_dir():
        logger.warning("%s is not written, as there is a folder of that name.", path)
    return not path.is_dir()


def write_card(path: Path, text: str) -> None:
    """Writes a card, with the very bytes that `card_text` read."""
    with open(path, "w", encoding="utf-8", errors=_KEEP, newline="") as file:
        file.write(text)


def _text_of(path: Path) -> str:
    """Returns a card's text, which is the user's: line breaks and bytes that are no text are kept."""
    with open(path, encoding="utf-8", errors=_KEEP, newline="") as file:
        text = file.read()
    if any("\udc80" <= letter <= "\udcff" for letter in text):
        logger.warning(
            "%s is not text in UTF-8. Its bytes are kept, and the section on pruning is added; save "
            "the card in UTF-8.",
            path,
        )
    return text


def new_card(section: str, facts: CardFacts | None = None) -> str:
    """Returns a card with only the section."""
    facts = facts or CardFacts()
    data = ModelCardData(
        base_model=facts.base_model,
        library_name="transformers",
        pipeline_tag=facts.pipeline,
        tags=["kprune", "pruning"],
        metrics=list(facts.metrics) or None,
    )
    return with_section(f"---\n{data.to_yaml()}\n---\n\n# Pruned model", section, _OWNER)


def remote_card(
    repo_id: str, section: str, token: str | bool | None, facts: CardFacts | None = None
) -> str:
    """Returns the card of a repository on the hub, or a new one, with the section."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        text = str(ModelCard.load(repo_id, token=token))  # type: ignore[arg-type]
    except EntryNotFoundError:
        return new_card(section, facts)
    except (ValueError, YAMLError) as error:
        logger.warning(
            "The card of %s is damaged (%s). Its text is kept as it is, and the section on pruning is "
            "added.",
            repo_id,
            str(error)[:200],
        )
        text = _text_of(Path(hf_hub_download(repo_id, CARD_NAME, token=token)))
    return with_section(text, section, _OWNER)
