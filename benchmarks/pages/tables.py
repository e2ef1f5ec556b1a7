"""Tables of the committed results, cut down and with the names that readers know.

A page asks for a table with a comment, and `python -m benchmarks.pages.write` fills it in:

    <!-- table kprune_accuracy 0: task | method | result; where task=sst2|mrpc -->
    <!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..common.figures import DATA_NAMES, LOOKS
from ..common.records import table

_REQUEST = re.compile(
    r"(<!-- table (?P<name>\w+) (?P<number>\d+): (?P<columns>[^;]*?)(?:; where (?P<where>.*?))? -->\n)"
    r"(?P<old>.*?)(?P<end><!-- end -->)",
    flags=re.DOTALL,
)


#: What follows the name of a method whose result was distilled.
_DISTILLED = ", distilled"
#: What names mean that only one study has, or that mean something else there.
_OWN_NAMES: Mapping[str, Mapping[str, str]] = {
    "corda_init": {"ours": "peft_corda", "ours-least": "peft_corda, smallest `max_memory`"},
}


def fill(text: str, results: Path) -> str:
    """Returns a page with every table that it asks for, made anew.

    Args:
        text: The page.
        results: Folder with the studies' tables.

    Raises:
        ValueError: If a study has no such table, or a table no such column.
    """

    def filled(found: re.Match[str]) -> str:
        page = (results / f"{found['name']}.md").read_text(encoding="utf-8")
        tables = tables_of(page)
        number = int(found["number"])
        if number >= len(tables):
            raise ValueError(f"{found['name']}.md has {len(tables)} tables, not {number + 1}.")
        columns = [part.strip() for part in found["columns"].split(" | ")]
        names = _OWN_NAMES.get(found["name"], {})
        made = cut(tables[number], columns, _conditions(found["where"] or ""), names)
        return f"{found[1]}\n{made}\n{found['end']}"

    return _REQUEST.sub(filled, text)


def tables_of(page: str) -> list[list[list[str]]]:
    """The tables of a page in Markdown, each as rows of cells, of which the first names the columns."""
    found = re.findall(r"(?:^\|.*\|\n)+", page, flags=re.MULTILINE)
    split = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in one.splitlines()]
        for one in found
    ]
    return [[rows[0], *rows[2:]] for rows in split]


def cut(
    rows: list[list[str]],
    columns: list[str],
    where: Mapping[str, list[str]],
    names: Mapping[str, str],
) -> str:
    """Some columns of the rows that have the wanted values, as Markdown."""
    head = rows[0]
    missing = [name for name in (*columns, *where) if name not in head]
    if missing:
        raise ValueError(f"No column {', '.join(missing)}; there are {', '.join(head)}.")
    twice = [name for name in (*columns, *where) if head.count(name) > 1]
    if twice:
        raise ValueError(
            f"Several columns are called {', '.join(twice)}. Give them names of their own."
        )
    wanted = [
        row
        for row in rows[1:]
        if all(row[head.index(name)] in values for name, values in where.items())
    ]
    places = [head.index(name) for name in columns]
    return table(columns, [[_named(row[place], names) for place in places] for row in wanted])


def _named(cell: str, names: Mapping[str, str]) -> str:
    if cell in names:
        return names[cell]
    plain = cell.removesuffix(_DISTILLED)
    method, *options = plain.split(" ") if plain.split(" ")[0] in LOOKS else [plain]
    name = LOOKS[method].name if method in LOOKS else DATA_NAMES.get(method, method)
    return (f"{name}, `{' '.join(options)}`" if options else name) + cell[len(plain) :]


def _conditions(text: str) -> dict[str, list[str]]:
    parts = [part.strip() for part in text.split(";") if part.strip()]
    return {name: values.split("|") for name, _, values in (part.partition("=") for part in parts)}
