"""Names of llama.cpp for the way in which a tokenizer splits text before it merges bytes.

llama.cpp has these rules built in, by name. Here the name follows from the rules themselves, which are
in the tokenizer's JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Parts of the regular expressions that the tokenizers of these families split text by.
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_MARKS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

#: By regular expression and whether words of the vocabulary are taken whole (`ignore_merges`), the name.
_REGULAR: dict[tuple[str, bool], str] = {
    (rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACE}", True): "llama-bpe",
    (rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACE}", False): "smaug-bpe",
    (rf"{_SHORT}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACE}", False): "qwen2",
    (
        rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_MARKS_SLASH}|{_SPACE}",
        True,
    ): "tekken",
    (
        rf"{_START}{_UPPER}*{_LOWER}+{_SHORT}?|{_START}{_UPPER}+{_LOWER}*{_SHORT}?|\p{{N}}{{1,3}}"
        rf"|{_MARKS_SLASH}|{_SPACE}",
        False,
    ): "gpt-4o",
}
KNOWN = ("gpt-2", "smollm", *_REGULAR.values())


def pre_tokenizer_name(state: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer.

    Args:
        state: The tokenizer's JSON, as in `tokenizer.json`.

    Raises:
        ValueError: If llama.cpp is not known to have it.
    """
    model = state["model"]
    ignores = bool(model.get("ignore_merges"))
    steps = _steps(state.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    name = None
    if any(step.get("add_prefix_space") for step in steps):
        raise _unknown("it puts a space before every text, which llama.cpp does not do for it")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not ignores:
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[1].get("use_regex", True) and not ignores:
        name = "smollm" if steps[0].get("individual_digits") else None
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        split = steps[0]
        plain = split.get("behavior") == "Isolated" and not split.get("invert")
        name = _REGULAR.get((split["pattern"].get("Regex", ""), ignores)) if plain else None
    if name is None:
        raise _unknown(f"its steps are {', '.join(kinds) or 'none'}")
    return name


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    return [pre_tokenizer]


def _unknown(why: str) -> ValueError:
    return ValueError(
        f"The tokenizer splits text in a way that is not known of llama.cpp: {why}. If llama.cpp has "
        "it, pass its name as pre_tokenizer; the names known here are "
        f"{', '.join(KNOWN)}."
    )
