"""The device that the tests here run on: `TEST_DEVICE`, by default the CPU."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(os.environ.get("TEST_DEVICE", "cpu"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device" in item.path.parts[-2]:
            item.add_marker(pytest.mark.device)
