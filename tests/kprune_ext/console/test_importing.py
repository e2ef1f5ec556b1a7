"""The commands read their arguments before they import anything large."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from kprune_ext.console.importing import runs_a_command

LIGHT = """
import contextlib, io, json, sys
program, package, cases = json.loads(sys.argv[1])
sys.argv = [f"/somewhere/bin/{program}"]
from importlib import import_module
main = import_module(f"{package}.cli").main
codes = []
for arguments in cases:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as stopped:
            codes.append(stopped.code)
heavy = ["torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pandas", "rich"]
print(json.dumps([codes, [name for name in heavy if name in sys.modules]]))
"""


@pytest.mark.parametrize(
    ("program", "package"), [("kprune", "kprune_ext"), ("peft-corda", "peft_corda")]
)
def test_no_large_library_before_the_arguments_are_right(program: str, package: str) -> None:
    commands = list(import_module(f"{package}.cli.main").PROGRAM.commands)
    right = [["--help"], ["--version"], *([name, "--help"] for name in commands)]
    wrong = [[], ["nothing"], *([name, "--nothing=1"] for name in commands)]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps([program, package, [*right, *wrong]])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    codes, heavy = json.loads(done.stdout)
    assert heavy == []
    assert codes == [0] * len(right) + [2] * len(wrong)


REGISTERED = """
import sys
sys.argv = ["kprune"]
import kprune_ext
assert "torch" not in sys.modules and "KPruneConfig" in dir(kprune_ext)
from kprune_ext.cli import main
try:
    main(["report", sys.executable])
except SystemExit as stopped:
    assert "is not a report" in stopped.code, stopped.code
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "kprune_ext_bert" in CONFIG_MAPPING
"""


def test_a_command_registers_before_it_works() -> None:
    done = subprocess.run([sys.executable, "-c", REGISTERED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Nor do others comment on kernels that this machine cannot use.
    assert not [name for name in ("torchao", "bitsandbytes", "pytree") if name in done.stderr]


@pytest.mark.parametrize(
    ("argv", "original", "wanted"),
    [
        (["/usr/bin/kprune", "prune"], [], True),
        (["peft-corda"], [], True),
        ([r"kprune.exe"], [], True),
        (["-m"], ["python", "-X", "dev", "-m", "kprune_ext", "--help"], True),
        (["-m"], ["python", "-m", "peft_corda"], True),
        (["-m"], ["python", "-m", "pytest", "-m", "kprune_ext"], False),
        (["/home/me/kprune.py"], [], False),
        (["train.py", "kprune"], [], False),
        ([""], [], False),
        ([], [], False),
    ],
)
def test_what_runs_a_command(argv: list[str], original: list[str], wanted: bool) -> None:
    assert runs_a_command(argv, original) is wanted


@pytest.mark.parametrize("name", ["kprune_ext", "peft_corda"])
def test_names_are_the_same_everywhere(name: str) -> None:
    """In `__all__`, for tab completion, with a star, and for type checkers."""
    package: Any = import_module(name)
    shown = {one for one in dir(package) if not one.startswith("__")}
    assert shown == set(package.__all__) - {"__version__"}
    assert "__version__" in dir(package) and "__doc__" in dir(package)
    for one in shown:
        assert getattr(package, one).__name__ == one
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018
    star: dict[str, Any] = {}
    exec(f"from {name} import *", star)
    assert shown <= star.keys()
    text = Path(package.__file__).read_text(encoding="utf-8")
    typed = text[text.index("if TYPE_CHECKING:") : text.index("else:")]
    assert all(one in typed.replace(",", " ").split() for one in shown)


@pytest.mark.parametrize("name", ["kprune_ext", "peft_corda"])
def test_help_of_the_package(name: str) -> None:
    import pydoc

    package: Any = import_module(name)
    text = pydoc.render_doc(package, renderer=pydoc.plaintext)
    assert all(one in text for one in package.__all__ if one != "__version__")
