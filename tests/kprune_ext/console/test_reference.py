"""The page of the command line is that of the present options."""

from __future__ import annotations

from pathlib import Path

from kprune_ext.console.reference import both_programs, reference_page

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "cli.md"


def test_the_page_is_up_to_date() -> None:
    """If not: python -m kprune_ext.console.reference > docs/reference/cli.md"""
    assert PAGE.read_text(encoding="utf-8") == reference_page(both_programs())


def test_every_option_has_a_text() -> None:
    for program in both_programs():
        for name, command in program.commands.items():
            without = [own.name for own in command.members.values() if not own.text]
            assert not without, f"{program.name} {name}"
            groups = [one.name for members in command.grouped().values() for one in members]
            assert sorted(groups) == sorted(command.members)  # each once
