"""Nothing goes by the order of a set, which is another one in every process."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.house.test_sizes import FILES

ORDERED = {"list", "tuple", "enumerate", "zip", "join"}


def is_set(node: ast.AST) -> bool:
    """Whether an expression is a set, or goes through one."""
    if isinstance(node, ast.GeneratorExp):
        return any(is_set(part.iter) for part in node.generators)
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return isinstance(node, ast.Set | ast.SetComp) or (
        named and node.func.id in {"set", "frozenset"}
    )


def ordered_sets(tree: ast.AST) -> Iterator[int]:
    """The lines in which a set becomes a sequence, without being sorted by its values themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            by_key = name == "sorted" and any(word.arg == "key" for word in node.keywords)
            found = (name in ORDERED or by_key) and any(map(is_set, node.args))
        elif isinstance(node, ast.ListComp):
            found = any(is_set(part.iter) for part in node.generators)
        else:
            found = isinstance(node, ast.Starred) and is_set(node.value)
        if found:
            yield node.lineno


@pytest.mark.parametrize(
    "line", ["sorted({a, b}, key=len)", "[b for b in {c, d}]", "tuple(b for b in set(c))"]
)
def test_ordered_sets_are_found(line: str) -> None:
    assert list(ordered_sets(ast.parse(line))) == [1]
    assert not list(ordered_sets(ast.parse("sorted(set(a)); {b for b in {c, d}}; len({a, b})")))


def test_no_file_uses_the_order_of_a_set() -> None:
    lines = {str(path): list(ordered_sets(ast.parse(path.read_text("utf-8")))) for path in FILES}
    assert not {path: found for path, found in lines.items() if found}
