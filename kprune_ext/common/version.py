"""Version of the distribution that contains both packages."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "peft-corda"


def installed_version() -> str:
    """Returns the installed version, or `"unknown"` if the packages run without being installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
