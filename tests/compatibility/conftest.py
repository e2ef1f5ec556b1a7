"""All tests of old files run in the folder of those files."""

from __future__ import annotations

import pytest

from tests.helpers.v0_1 import DATA


@pytest.fixture(autouse=True)
def _in_the_folder(monkeypatch) -> None:
    """Adapters note the path of their base as seen from there."""
    monkeypatch.chdir(DATA)
