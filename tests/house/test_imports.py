"""Imports go down only: from the command line through the wings to the common ground floor."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up. Modules that lie directly in a package are its wing "root".
WINGS = {
    "kprune_ext": (
        "common", "files", "console", "architectures", "units", "model_layers", "samples", "calibration",
        "knowledge", "budget", "tuning", "report", "checkpoint_files", "modeling", "evaluation",
        "preparation", "judging", "export", "root", "command_inputs", "cli",
    ),
    "peft_corda": (
        "decomposition", "root", "batches", "base_model", "export", "analysis", "adapter_layers",
        "adapter", "retention", "checkpoint", "planning", "calibration", "cli",
    ),
}  # fmt: skip
SHARED = ("common", "files", "console")  # wings that both packages use
FACES = {"__init__", "__main__"}  # these hold what the package shows, and may import anything


def modules():
    """Path by dotted name of every module of both packages."""
    paths = [path for package in WINGS for path in sorted((ROOT / package).rglob("*.py"))]
    return {dotted(path): path for path in paths}


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(name, path, known):
    """Modules of ours that a module imports, wherever in its text."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            base = above[: len(above) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found.add(inner if inner in known else origin)
    return {module for module in found if module.split(".")[0] in WINGS}


def place(name):
    """Package, wing and floor of a module."""
    package, *inner = name.split(".")
    wing = inner[0] if len(inner) > 1 or (inner[:1] and inner[0] in WINGS[package]) else "root"
    return package, wing, WINGS[package].index(wing)


@pytest.fixture(scope="module")
def arrows():
    known = modules()
    return {
        (name, other)
        for name, path in known.items()
        for other in imports_of(name, path, known)
        if name != other
    }


def is_face(name):
    """The `__init__` of a package or wing, and `__main__`."""
    path = modules()[name]
    return path.stem in FACES


def test_every_module_is_in_a_wing():
    for name, path in modules().items():
        package, wing, _ = place(name)
        assert wing in WINGS[package], path


def test_no_circle(arrows):
    """Modules can be ordered such that each imports only those before it."""
    left = {name: {b for a, b in arrows if a == name} for name in modules()}
    while True:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        if not free:
            break
        for name in free:
            del left[name]
    assert not left, f"circles among {sorted(left)}"


def test_nothing_imports_a_higher_wing(arrows):
    upward = []
    for name, other in sorted(arrows):
        package, wing, floor = place(name)
        theirs, other_wing, other_floor = place(other)
        if package == theirs and other_floor > floor and not (wing == "root" and is_face(name)):
            upward.append(f"{name} ({wing}) -> {other} ({other_wing})")
    assert not upward, "\n".join(upward)


def test_the_packages_meet_on_the_ground_floor_alone(arrows):
    """`kprune_ext` knows nothing of `peft_corda`, which uses what both share and no more."""
    between = [(a, b) for a, b in arrows if place(a)[0] != place(b)[0]]
    assert between, "nothing is shared any more"
    for name, other in between:
        assert place(name)[0] == "peft_corda", f"{name} -> {other}"
        assert place(other)[1] in SHARED, f"{name} -> {other}"


def test_the_ground_floor_imports_nothing_of_ours(arrows):
    for name, other in arrows:
        if place(name)[1] == "common":
            assert place(other)[1] == "common", f"{name} -> {other}"
