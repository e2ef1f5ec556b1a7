"""What `import` of a package does: public names on demand, and registration with other libraries.

Both packages register classes with transformers or PEFT when they are imported, so that
`AutoModel.from_pretrained` and `PeftModel.from_pretrained` know them. That takes PyTorch and
transformers, several seconds, and a library can be told only once it is imported: neither of them looks
for other packages by itself. The commands `kprune` and `peft-corda` live in the packages, so that Python
imports the package first. In a process that runs one of the commands, registration therefore waits until
the arguments have been read; everywhere else it takes place at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import PurePath
from typing import Any

#: Package of a command, by its name.
COMMANDS = {"kprune": "kprune_ext", "peft-corda": "peft_corda"}

_waiting: list[Callable[[], None]] = []


def on_import(register: Callable[[], None]) -> None:
    """Calls a function now, or in the process of a command once `finish_imports` is called."""
    if runs_a_command(sys.argv, sys.orig_argv):
        _waiting.append(register)
    else:
        register()


def finish_imports() -> None:
    """Does what importing the packages has put off. Nothing is left to do elsewhere."""
    while _waiting:
        _waiting.pop(0)()


def runs_a_command(argv: list[str], orig_argv: list[str]) -> bool:
    """Returns whether a process was started as `kprune`, `peft-corda` or `python -m` of a package.

    Args:
        argv: `sys.argv` while the package is imported. Its first item is the path of the program; for
            `python -m` it is `-m` until the module is found.
        orig_argv: `sys.orig_argv`, the arguments of the interpreter.
    """
    started = argv[0] if argv else ""
    if started == "-m":
        after = orig_argv[orig_argv.index("-m") + 1 :] if "-m" in orig_argv else []
        return after[:1] in [[package] for package in COMMANDS.values()]
    program = PurePath(started)
    return program.stem in COMMANDS and program.suffix in ("", ".exe")


def public_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns the functions `__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: Name of the package.
        modules: Relative name of the module that defines a public name, by public name.
    """

    def on_demand(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        finish_imports()
        value = getattr(import_module(modules[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    def shown() -> list[str]:
        special = [name for name in vars(sys.modules[package]) if name.startswith("__")]
        return sorted({*special, *modules})

    return on_demand, shown
