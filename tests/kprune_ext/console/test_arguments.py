"""What a user types, and what a command takes it for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest

from kprune_ext.common.command_line import Aliases
from kprune_ext.console.arguments import present_arguments
from kprune_ext.console.options import Command
from kprune_ext.console.program import Program


@dataclasses.dataclass(frozen=True)
class Options:
    """Do something.

    Args:
        model: A model.
        r: A rank.
        rank_pattern: Ranks by name.
        text_field: Fields.
        kept: Names.
        target_modules: Modules.
        exclude_modules: Other modules.
        task: A task.
        size: A size.
        pack: A switch.
    """

    model: str
    r: int = 16
    rank_pattern: dict[str, int] | None = None
    text_field: list[str] | str = "text"
    kept: list[str] | None = None
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    task: Literal["causal-lm", "masked-lm"] = "causal-lm"
    size: float = 0.5
    pack: bool = False


@dataclasses.dataclass(frozen=True)
class Places:
    """Do something with files.

    Args:
        source: What to read.
        target: What to write.
        r: A rank.
    """

    source: str
    target: str
    r: int = 1


ALIASES = Aliases({"out": "output", "field": "text_field"}, meant={"rank": ("r",)})
PROGRAM = Program(
    "tool", "A tool.", "nowhere", {"do": Command(Options, ""), "turn": Command(Places, "", True)},
    ALIASES,
)  # fmt: skip


def taken(*args: str) -> Options:
    return PROGRAM.parsed(["do", "--model=m", *args])[1]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The message of arguments that are refused, in two lines."""
    with pytest.raises(SystemExit) as stopped:
        PROGRAM.parsed(list(args))
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    said, where = printed.err.strip().splitlines()
    assert not printed.out and where.startswith("See: tool") and where.endswith(" --help")
    return said


@pytest.mark.parametrize(
    "typed",
    [
        "--text_field a b",
        "--text_field a,b",
        "--text-field=a,b",
        "--text_field a --text_field b",
        "--text_field=a --text-field=b",
        "--text_field [a,b]",
        "--field a --text_field b",
        "--text_field a --r 16 --text_field b",
    ],
)
def test_lists_have_one_rule(typed: str) -> None:
    assert taken(*typed.split()).text_field == ["a", "b"]


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (["--text_field", "a"], "a"),
        (["--text_field", "[a]"], ["a"]),
        (["--text_field", '["a, b"]'], ["a, b"]),
        (["--text_field", "a, b"], ["a", "b"]),
        (["--text_field=[]"], []),
    ],
)
def test_one_field_and_fields_with_commas(typed: list[str], wanted: object) -> None:
    assert taken(*typed).text_field == wanted


def test_a_list_of_names_is_a_list_even_of_one() -> None:
    assert taken("--kept", "head").kept == ["head"]
    assert taken("--kept", "null").kept is None


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("q_proj", ["q_proj"]),
        ("layers.0.q_proj", ["layers.0.q_proj"]),
        ("q_proj v_proj", ["q_proj", "v_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("all-linear", "all-linear"),
        (r".*\.q_proj", r".*\.q_proj"),
        ("[qv]_proj", "[qv]_proj"),
        (r"layers\.\d{1,2}\.q", r"layers\.\d{1,2}\.q"),
    ],
)
def test_module_names_and_patterns(typed: str, wanted: object, tmp_path: Path) -> None:
    """A bare name is a name, as in PEFT; a pattern has characters that names do not have."""
    assert taken("--target_modules", *typed.split()).target_modules == wanted
    (tmp_path / "options.yaml").write_text(json.dumps({"target-modules": typed.replace(" ", ",")}))
    assert taken(f"--config={tmp_path / 'options.yaml'}").target_modules == wanted


def test_several_patterns_are_to_be_joined(capsys) -> None:
    said = refused(capsys, "do", "--model=m", "--target_modules", "q.*", "v.*")
    assert "Join several patterns to one with '|'" in said


@pytest.mark.parametrize(
    "typed",
    [
        "--rank_pattern q=8 v=4",
        "--rank_pattern q=8,v=4",
        "--rank-pattern q=8 --rank-pattern v=4",
        '--rank_pattern {"q":8,"v":4}',
        "--rank_pattern.q 8 --rank-pattern.v=4",
    ],
)
def test_names_with_numbers(typed: str) -> None:
    assert taken(*typed.split()).rank_pattern == {"q": 8, "v": 4}


@pytest.mark.parametrize(
    "content",
    ["text-field: [a, b]", "text_field: a,b", "field: 'a, b'", "text_field:\n- a\n- b"],
)
def test_a_file_has_the_same_rule(content: str, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(content)
    assert taken("--config", str(tmp_path / "options.yaml")).text_field == ["a", "b"]
    later = taken("--config", str(tmp_path / "options.yaml"), "--text_field", "c")
    assert later.text_field == "c"
    added = taken(
        "--config", str(tmp_path / "options.yaml"), "--text_field+", "c", "--text_field+=d"
    )
    assert added.text_field == ["a", "b", "c", "d"]


def test_other_values_stay_as_they_are() -> None:
    found = taken(
        "--size", "-1", "--task=masked-lm", "--r", "3", "--r=4", "--pack", "--model", "a,b"
    )
    assert (found.size, found.task, found.r, found.pack) == (-1, "masked-lm", 4, True)
    assert found.model == "a,b"
    assert PROGRAM.parsed(["turn", "a", "--r", "2", "b"])[1] == Places("a", "b", 2)
    given = ["a-b", "--r=4", "--", "-x"]
    assert present_arguments(given, PROGRAM.commands["turn"].members, ALIASES, 2) == given


@pytest.mark.parametrize("typed", ["--help", "-h", "--text_field a -h"])
def test_help(typed: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        PROGRAM.parsed(["do", *typed.split()])
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert shown.startswith("usage: tool do --model MODEL [options]")
    assert shown.index("required:") < shown.index("\noptions:") < shown.index("general:")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--rank 8", "There is no option --rank. Did you mean --r or --rank_pattern?"),
        ("--mod m", "There is no option --mod. Did you mean --model?"),
        ("--text-fields a", "There is no option --text_fields. Did you mean --text_field?"),
        ("--modules q", "Did you mean --target_modules or --exclude_modules?"),
        ("--zzz 1", "tool do: error: There is no option --zzz."),
        (
            "--task causal",
            "--task=causal cannot be used. Pass one of causal-lm, masked-lm. Did you mean",
        ),
        ("--r many", "--r=many cannot be used. Pass a whole number."),
        ("--size big", "--size=big cannot be used. Pass a number."),
        ("--r", "--r has no value. Write --r VALUE."),
        ("--rank_pattern q", "q is not a name with a number. Pass such as --rank_pattern q_proj=8"),
        ("--rank_pattern q=a", "--rank_pattern"),
        ("extra", "'extra' belongs to no option. Write options as --name value"),
        ("--config none.yaml", "none.yaml"),
    ],
)
def test_mistakes_are_told_in_two_lines(typed: str, message: str, capsys) -> None:
    assert message in refused(capsys, "do", "--model=m", *typed.split())


def test_mistakes_without_options(capsys) -> None:
    assert "Missing: --model." in refused(capsys, "do")
    assert "Missing: source, target." in refused(capsys, "turn", "--r=2")
    assert "There is no command 'trun'. Did you mean turn?" in refused(capsys, "trun")
    assert "No command is given. Pass one of do, turn." in refused(capsys)
    assert "no command 'xyz'. Pass one of do, turn." in refused(capsys, "xyz")


def test_mistakes_in_a_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("rank: 3")
    said = refused(capsys, "do", f"--config={path}")
    assert f"{path}: There is no option rank. Did you mean r or rank_pattern?" in said
    for content in ("- a\n- b\n", "a: [", "\x00\xff", "text"):
        path.write_bytes(content.encode("latin-1"))
        assert "tool do: error: " in refused(capsys, "do", "--model=m", f"--config={path}")
