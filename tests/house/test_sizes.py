"""Functions that a reader can hold in their head, and files that a reader can find things in."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("peft_corda", "kprune_ext", "tests", "benchmarks", "examples")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MOST_LINES, MOST_IN_A_BODY, MOST_ROOMS = 300, 60, 11


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                lines = body[-1].end_lineno - body[0].lineno + 1
                assert lines <= MOST_IN_A_BODY, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("package", ["peft_corda", "kprune_ext"])
def test_a_wing_has_few_rooms(package):
    for folder in [ROOT / package, *(path for path in (ROOT / package).iterdir() if path.is_dir())]:
        rooms = [path for path in folder.glob("*.py") if not path.stem.startswith("__")]
        assert len(rooms) <= MOST_ROOMS, folder
