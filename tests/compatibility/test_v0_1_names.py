"""Names and console options of version 0.1 are still there.

They are listed in `tests/data/v0_1/names.json`. Options may have got new names beside the old ones.
"""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from kprune_ext.architectures import ARCHITECTURES

DATA = Path(__file__).parents[1] / "data" / "v0_1"
NAMES: dict[str, Any] = json.loads((DATA / "names.json").read_text(encoding="utf-8"))
PUBLIC = [(package, name) for package, names in NAMES["all"].items() for name in names]
#: Taken away on purpose: an argument with one possible value, and JSON that `to_dict` gives as well.
REMOVED = {
    "peft_corda.allocate_ranks": {"rule"},
    "kprune_ext.KPruneConfig": {"to_json", "from_json"},
}
#: Program, subcommand and one of its options or positionals.
OPTIONS = [
    pytest.param(program, command, option, id=f"{program} {command} {option['name']}")
    for program, commands in NAMES["options"].items()
    for command, options in commands.items()
    for option in options
]


def main_of(program: str) -> Any:
    """The function that a console program runs: of `cli`, or of `cli.main` if that is a package."""
    package = NAMES["programs"][program]
    for name in (f"{package}.cli", f"{package}.cli.main"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        if callable(getattr(module, "main", None)):
            return module.main
    raise AssertionError(f"no main in {package}.cli")


def parsed(program: str, arguments: list[str]) -> Any:
    """What the program takes arguments for; it prints that, and does nothing else.

    The program as a whole is asked, as it may read old spellings before its parser comes to them.
    """
    with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit) as stopped:
        main_of(program)([*arguments, "--print_config"])
    assert not stopped.value.code, arguments
    return yaml.safe_load(printed.getvalue())


def required(program: str, command: str, **given: str) -> list[str]:
    """Arguments that a command cannot do without: positionals, and options with a value each."""
    arguments = [command]
    for row in NAMES["options"][program][command]:
        if row["required"]:
            value = given.get(row["name"], "something")
            arguments.append(f"{row['options'][0]}={value}" if row["options"] else value)
    return arguments


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_name_is_public(package: str, name: str) -> None:
    module = importlib.import_module(package)
    assert name in module.__all__
    assert getattr(module, name) is not None
    # And with a star.
    found: dict[str, Any] = {}
    exec(f"from {package} import *", found)
    assert name in found


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_parameters_and_members(package: str, name: str) -> None:
    """Arguments in their old order, so that calls without names mean what they did."""
    value = getattr(importlib.import_module(package), name)
    removed = REMOVED.get(f"{package}.{name}", set())
    old = [key for key in NAMES["parameters"][f"{package}.{name}"] if key not in removed]
    if old:
        present = inspect.signature(value).parameters
        others = [key for key, one in present.items() if one.kind is not one.KEYWORD_ONLY]
        assert set(old) <= set(present)
        kept = [key for key in old if key in others]
        assert [key for key in others if key in kept] == kept
    members = set(NAMES["members"][f"{package}.{name}"]) - removed
    fields = getattr(value, "__dataclass_fields__", {})
    assert all(hasattr(value, member) or member in fields for member in members)


def test_version_is_told() -> None:
    for package in NAMES["all"]:
        assert isinstance(importlib.import_module(package).__version__, str)


def test_families() -> None:
    assert set(NAMES["model types"]) <= {row.model_type for row in ARCHITECTURES}


def test_classes_of_pruned_models() -> None:
    """In the module that adapters name, all but those of families that need a newer transformers."""
    modeling = importlib.import_module("kprune_ext.modeling")
    old = [row for row in ARCHITECTURES if not row.is_available]
    missing = [name for name in NAMES["modeling"] if not hasattr(modeling, name)]
    assert len(NAMES["modeling"]) == 60
    assert not missing or old
    for name in set(NAMES["modeling"]) - set(missing):
        kind = getattr(modeling, name)
        # Configs have the name, and adapters that are made now name the module of the class.
        assert kind.__name__ == name
        assert getattr(importlib.import_module(kind.__module__), name) is kind


@pytest.mark.parametrize(("program", "command", "option"), OPTIONS)
def test_option_is_accepted(program: str, command: str, option: dict[str, Any], capsys) -> None:
    arguments = required(program, command)
    if option["name"] == "help":
        for name in option["options"]:
            with pytest.raises(SystemExit) as stopped:
                main_of(program)([command, name])
            assert not stopped.value.code
            assert "usage:" in capsys.readouterr().out
        return
    before = parsed(program, arguments)
    if option["name"] == "print_config":
        assert option["options"] == ["--print_config"] and isinstance(before, dict)
    elif option["name"] == "config":  # with files in test_v0_1_console.py
        assert option["options"] == ["--config"]
        with pytest.raises(SystemExit) as stopped:
            main_of(program)([command, "--config", "no such file"])
        assert stopped.value.code
        assert "no such file" in capsys.readouterr().err
    elif not option["options"]:
        found = parsed(program, required(program, command, **{option["name"]: "text"}))
        assert "text" in found.values() and found != before
    elif not option["values"]:
        for name in option["options"]:
            assert parsed(program, [*arguments, name]) != before
    else:
        check_values(program, arguments, option, before)


def check_values(program: str, arguments: list[str], option: dict[str, Any], before: Any) -> None:
    """Every value is accepted, and one that is not the default changes what the command is to do."""
    for name in option["options"]:
        # A name with a plus adds to a list.
        values = [one for one in option["values"] if not (name.endswith("+") and one == "null")]
        found = [parsed(program, [*arguments, f"{name}={value}"]) for value in values]
        assert any(one != before for one in found)
        assert parsed(program, [*arguments, name, values[-1]]) == found[-1]


@pytest.mark.parametrize("program", NAMES["options"])
def test_an_option_that_never_was_is_refused(program: str, capsys) -> None:
    """So that the test above says something."""
    for command in NAMES["options"][program]:
        for wrong in ("--never_was=1", "--config=no such file"):
            with pytest.raises(SystemExit) as stopped:
                main_of(program)([*required(program, command), wrong, "--print_config"])
            assert stopped.value.code
            capsys.readouterr()
    command, option = {"peft-corda": ("plan", "--dtype"), "kprune": ("prune", "--metric")}[program]
    with pytest.raises(SystemExit) as stopped:
        main_of(program)([*required(program, command), f"{option}=never_was", "--print_config"])
    assert stopped.value.code
    assert "never_was" in capsys.readouterr().err


@pytest.mark.parametrize("program", NAMES["programs"])
def test_program_is_one_of_the_distribution(program: str) -> None:
    """As it is declared; what is installed may be of before the last change of that."""
    text = (DATA.parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    value = tomllib.loads(text)["project"]["scripts"][program]
    assert value.partition(":")[0].partition(".")[0] == NAMES["programs"][program]
    with pytest.raises(SystemExit) as stopped:
        EntryPoint(program, value, "console_scripts").load()(["--help"])
    assert not stopped.value.code


@pytest.mark.parametrize("package", NAMES["programs"].values())
def test_package_runs_as_a_program(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", package, "--help"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "usage:" in done.stdout
    program = next(name for name, own in NAMES["programs"].items() if own == package)
    for command in NAMES["options"][program]:
        assert command in done.stdout
