"""Snapshots of a running pass: its partial sums, and the batches that they were computed from."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kprune_ext.files.writing import atomic_save

from ..batches.batches import digest_of
from ..decomposition.covariance import CovarianceAccumulator
from .identity import full_digest_of

# Snapshots are delayed so that writing them takes at most this share of the time.
_SHARE = 0.1


class Snapshots:
    """Partial sums of a running pass, written from time to time.

    Args:
        path: File of the snapshot.
        number: Number of the pass.
        seconds: Minimum time in seconds between two snapshots.
        plan: Digest of the plan that the sums belong to.
        goes_on: Whether a file without such a digest, from version 0.1, belongs to it as well.
        data: Digests of the batches, if they are known in advance.
        done: Digests of the batches of a pass that was finished before, if any.

    Attributes:
        seen: Digests of the batches of this pass, so far.
    """

    def __init__(
        self,
        path: Path,
        number: int,
        seconds: float,
        *,
        plan: str = "",
        goes_on: bool = True,
        data: Sequence[str] | None = None,
        done: Sequence[str] | None = None,
    ) -> None:
        self._path = path
        self._number = number
        self._seconds = seconds
        self._last = time.monotonic()
        self._cost = 0.0
        self._digest = ""
        self._plan = plan
        self._goes_on = goes_on
        self._data = data
        self._done = done
        self.seen: list[str] = []
        self._expected: tuple[int, str] = (0, "")

    def read(self) -> tuple[int, dict[str, tuple[Tensor, int]]]:
        """Returns the number of counted batches, and sums and tokens by module; 0 and {} at first."""
        if not self._path.exists():
            return 0, {}
        try:
            with safe_open(self._path, framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                if state["pass"] != self._number or not self._belongs(state.get("plan")):
                    return 0, {}
                tokens = state["tokens"]
                sums = {name: (file.get_tensor(name), tokens[name]) for name in tokens}
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{self._path} is not a snapshot of a calibration: {error}") from error
        self._expected = (state["batches"], state["data"])
        if self._data is not None and "seen" in state:
            check_first_batches(self._data, state["seen"], whole=False)
        return state["batches"], sums

    def saw(self, batch: Mapping[str, Any]) -> None:
        """Record a batch, counted or skipped.

        Raises:
            ValueError: If the skipped batches are not those from which the sums were computed.
        """
        self._digest = hashlib.sha256((self._digest + digest_of(batch)).encode()).hexdigest()
        self.seen.append(full_digest_of(batch))
        count = len(self.seen)
        if count == self._expected[0] and self._digest != self._expected[1]:
            _refuse(self._expected[0])
        if self._done is not None and self.seen[-1] != "".join(self._done[count - 1 : count]):
            _refuse(count)

    def saw_all(self) -> None:
        """Check the number of batches; to be called after the last one.

        Raises:
            ValueError: If the data has fewer batches than the sums were computed from.
        """
        wanted = max(self._expected[0], len(self._done or ()))
        if len(self.seen) < wanted:
            _refuse(wanted)

    def _belongs(self, plan: str | None) -> bool:
        if plan == self._plan or (plan is None and self._goes_on):
            return True
        warnings.warn(
            f"{self._path} belongs to another calibration, so that its pass is computed anew.",
            stacklevel=3,
        )
        return False

    def maybe_write(self, batches: int, sums: Mapping[str, CovarianceAccumulator]) -> None:
        """Write the sums of that many batches, unless the last snapshot is too recent."""
        now = time.monotonic()
        if now - self._last < max(self._seconds, self._cost / _SHARE if self._seconds else 0):
            return
        state = {
            "pass": self._number,
            "batches": batches,
            "data": self._digest,
            "plan": self._plan,
            "seen": self.seen,
            "tokens": {name: accumulator.tokens for name, accumulator in sums.items()},
        }
        tensors = {name: accumulator.sum.cpu() for name, accumulator in sums.items()}
        atomic_save(tensors, self._path, {"state": json.dumps(state)})
        self._last = time.monotonic()
        self._cost = self._last - now


def check_first_batches(data: Sequence[str], expected: Sequence[str], whole: bool = True) -> None:
    """Compares the digests of batches with those of an interrupted run.

    Args:
        data: Digests of all batches.
        expected: Digests of the batches of the interrupted run, or of the first of them.
        whole: Whether these were all.

    Raises:
        ValueError: If they differ.
    """
    if list(data[: len(expected)]) != list(expected) or (whole and len(data) != len(expected)):
        _refuse(len(expected))


def _refuse(count: int) -> None:
    raise ValueError(
        f"The calibration data differs from that of the interrupted run in its first {count} batches, "
        "so the run cannot be resumed. Give the same data in the same order (unshuffled or with a fixed "
        "seed), or another checkpoint_dir to start anew."
    )
