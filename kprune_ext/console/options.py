"""Commands as dataclasses of options, whose docstrings hold the help texts."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

#: Options of which a single value may be a pattern instead of a name, as in PEFT.
PATTERNS = ("target_modules", "exclude_modules")


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        name: Its name, with underscores.
        hint: Type of its value.
        default: Its default; `dataclasses.MISSING` if it is required.
        text: Help text.
    """

    name: str
    hint: Any
    default: Any
    text: str

    @property
    def is_required(self) -> bool:
        """Whether the option has no default."""
        return self.default is dataclasses.MISSING

    @property
    def takes_list(self) -> bool:
        """Whether the value may be a list, of names or of numbers."""
        return any(get_origin(one) is list for one in alternatives(self.hint))

    @property
    def takes_numbers(self) -> bool:
        """Whether the value is a list of numbers."""
        return any(
            get_origin(one) is list and get_args(one) == (float,) for one in alternatives(self.hint)
        )

    @property
    def takes_mapping(self) -> bool:
        """Whether the value is a mapping from names to numbers."""
        return any(get_origin(one) is dict for one in alternatives(self.hint))

    @property
    def takes_text(self) -> bool:
        """Whether the value may be a single text."""
        return str in alternatives(self.hint)

    def expected(self) -> str:
        """Returns what to pass, in words."""
        return " or ".join(_in_words(one) for one in alternatives(self.hint))


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        options: Dataclass of its options, whose docstring says what the command does, and in the
            section `Args` what each option is for.
        run: Module and function that do the work, such as `"prune:run_prune"`, relative to the wing
            `cli`. The module is imported only when the arguments are right.
        positional: Whether the required options are positional arguments.
        groups: Names of options by title, in the order in which the help lists them. Options that are
            in no group come after the required ones.
        after_ctrl_c: How to go on after an interruption with Ctrl-C, given the options.
    """

    options: type
    run: str
    positional: bool = False
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    after_ctrl_c: Callable[[Any], str] = lambda _: ""

    @property
    def sign(self) -> str:
        """What is written before the name of a required option."""
        return "" if self.positional else "--"

    @property
    def about(self) -> str:
        """One line that says what the command does."""
        return (self.options.__doc__ or "").partition("\n")[0]

    @cached_property
    def members(self) -> dict[str, Option]:
        """The options by name."""
        texts = help_texts(self.options)
        hints = get_type_hints(self.options)
        return {
            own.name: Option(own.name, hints[own.name], _default(own), texts.get(own.name, ""))
            for own in dataclasses.fields(self.options)
        }

    def grouped(self, optional: str = "options") -> dict[str, list[Option]]:
        """Returns the options by title: the required ones first, then those without a group.

        Options of the command itself come before those that it shares with others.
        """
        inside = {name for names in self.groups.values() for name in names}
        required = [own for own in self.members.values() if own.is_required]
        shared = set(self.members) - set(inspect.get_annotations(self.options))
        rest = [own for own in self.members.values() if not own.is_required]
        rest.sort(key=lambda own: own.name in shared)
        found = {
            "required": required,
            optional: [own for own in rest if own.name not in inside],
            **{
                title: [self.members[n] for n in names if n in self.members]
                for title, names in self.groups.items()
            },
        }
        return {title: members for title, members in found.items() if members}


def _default(own: dataclasses.Field[Any]) -> Any:
    made = own.default_factory
    return own.default if made is dataclasses.MISSING else made()


def help_texts(options: type) -> dict[str, str]:
    """Returns the help texts of a dataclass and its parents, from the sections `Args`."""
    from docstring_parser import parse  # a part of jsonargparse

    found: dict[str, str] = {}
    for kind in reversed(options.__mro__):
        if dataclasses.is_dataclass(kind):
            for one in parse(kind.__doc__ or "").params:
                found[one.arg_name] = " ".join((one.description or "").split())
    return found


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or the type itself, without None."""
    if get_origin(hint) not in (Union, UnionType):
        return (hint,)
    return tuple(one for one in get_args(hint) if one is not type(None))


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return "numbers" if get_args(hint) == (float,) else "names"
    if get_origin(hint) is dict:
        return "names with numbers, such as q_proj=8 v_proj=4"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "a text")
