"""Identity of a config, by which a new adapter finds the adapter that it is a clone of."""

from __future__ import annotations

import weakref
from typing import Any

from .factors import CordaFactors


class Origin:
    """Identity that a config shares with its copies, and with nothing else."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self


class SeenFactors:
    """Factors that an adapter was started from, without keeping them in memory.

    Args:
        given: The `corda_factors` of a config: a path, the factors themselves, or None.
    """

    def __init__(self, given: str | CordaFactors | None = None) -> None:
        self._given: Any = weakref.ref(given) if isinstance(given, CordaFactors) else given

    def covers(self, given: str | CordaFactors | None) -> bool:
        """Whether `given` is nothing new: None, or the factors that were seen."""
        seen = self._given() if isinstance(self._given, weakref.ref) else self._given
        return given is None or seen is given or (isinstance(given, str) and seen == given)

    def __deepcopy__(self, memo: dict[int, Any]) -> SeenFactors:
        return self

    def __reduce__(self) -> Any:
        return SeenFactors, ()  # weak references cannot be pickled
