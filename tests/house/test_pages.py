"""Pages that are short, tables and pictures that are up to date, messages that the code has."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks.common.records import RESULTS
from benchmarks.pages.pictures import PICTURES, source_of
from benchmarks.pages.tables import cut, fill, tables_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
REFERENCE = {"api.md", "reference/cli.md"}
MOST_WORDS = 1200


def name_of(path: Path) -> str:
    return str(path.relative_to(DOCS))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_page_is_short_and_in_the_navigation(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert name_of(path) in (ROOT / "mkdocs.yml").read_text()
    assert name_of(path) in REFERENCE or len(text.split()) <= MOST_WORDS
    first = next(line for line in text.splitlines() if not line.startswith("<!--"))
    assert first.startswith("# ")


@pytest.mark.parametrize("path", sorted((DOCS / "benchmarks").glob("*.md")), ids=name_of)
def test_tables_are_up_to_date(path: Path) -> None:
    """Run `python -m benchmarks.pages.write` after a study."""
    text = path.read_text(encoding="utf-8")
    assert fill(text, RESULTS) == text


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_from_the_committed_results_and_shown(name: str) -> None:
    """Run `python -m benchmarks.pages.write` after a study."""
    picture = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    assert source_of(name, RESULTS) in picture
    shown = f"pictures/{name}.svg)"
    assert any(shown in path.read_text(encoding="utf-8") for path in PAGES)


def test_a_table_is_cut_and_named(tmp_path: Path) -> None:
    rows = [
        ["method", "rate", "a, b"],
        ["lora", "1", "x"],
        ["kpm", "2", "y"],
        ["ours p=1", "3", "z"],
        ["ours p=1, distilled", "4", "z"],
    ]
    assert "| LoRA | x |" in cut(rows, ["method", "a, b"], {"rate": ["1", "2"]}, {})
    assert "| K-prune, `p=1` |\n| K-prune, `p=1`, distilled |" in cut(rows, ["method"], {}, {})
    assert "| mine |" in cut(rows, ["method"], {"rate": ["2"]}, {"kpm": "mine"})
    with pytest.raises(ValueError, match="Several columns are called rate"):
        cut([["rate", "rate"], ["1", "2"]], ["rate"], {}, {})
    with pytest.raises(ValueError, match="No column speed"):
        cut(rows, ["speed"], {}, {})
    (tmp_path / "one.md").write_text("Text.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    assert tables_of((tmp_path / "one.md").read_text()) == [[["a", "b"], ["1", "2"]]]
    page = "Before\n<!-- table one 0: b -->\nold\n<!-- end -->\nAfter\n"
    made = fill(page, tmp_path)
    assert "| 2 |" in made and "old" not in made and made.endswith("<!-- end -->\nAfter\n")
    assert fill(made, tmp_path) == made
    with pytest.raises(ValueError, match="has 1 tables"):
        fill(page.replace("one 0", "one 1"), tmp_path)


def test_messages_on_the_page_of_errors_are_those_of_the_code() -> None:
    texts = [
        node.value
        for folder in ("kprune_ext", "peft_corda")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = (DOCS / "faq.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (.*?) \|", page, flags=re.MULTILINE)
    quoted = [text for cell in cells for text in re.findall(r'"([^"]+)"', cell)]
    assert len(quoted) > 40
    for message in quoted:
        if "from transformers" in message or message.startswith("unknown model type"):
            continue  # that one is transformers' own
        for part in re.split("…", message):
            words = part.strip(" `,")
            assert len(words) < 4 or any(words in text for text in texts), message


def test_results_have_no_internal_names_left_in_pictures() -> None:
    """Every method that a study has run has a look of its own."""
    from benchmarks.common.figures import LOOKS

    for name in ("corda_finetune", "corda_encoder", "kprune_accuracy", "kprune_decoders"):
        runs = json.loads((RESULTS / f"{name}.json").read_text())["runs"]
        assert {run["method"] for run in runs} <= set(LOOKS), name
