"""The version of the distribution that both packages come in."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "peft-corda"


def installed_version() -> str:
    """The version that is installed; `"unknown"` where the packages are run without being installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
