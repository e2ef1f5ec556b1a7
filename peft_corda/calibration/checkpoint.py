"""Checkpoint on disk, from which an interrupted calibration is resumed.

The folder holds the plan (`plan.json`), the factors of every finished pass (`pass-0000.safetensors`)
and, per process, the sums of the pass that was running (`sums-0.safetensors`). Each file is written
under a temporary name and then renamed, so that it is either complete or missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kprune_ext.common.files import atomic_save, replacing, resolved
from kprune_ext.common.placement import full_parameters
from kprune_ext.common.processes import Processes

from ..base_model.batches import digest_of
from ..base_model.input_groups import Group
from ..config import CordaConfig, rank_of
from ..decomposition.covariance import CovarianceAccumulator
from ..factors import CordaFactors, sample_of

# Snapshots are delayed so that writing them takes at most this share of the time.
_SHARE = 0.1


class Checkpoint:
    """The folder of one calibration.

    Args:
        directory: Folder of the checkpoint, which is created if it does not exist.
        plan: Everything that the result depends on, from `identity`, as JSON-ready values.
        seconds: Minimum time in seconds between two snapshots of a running pass.
        processes: Processes that take part; the main process writes the files that they share.

    Raises:
        ValueError: If the folder holds the checkpoint of another calibration. The message names the
            differences.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        plan: Mapping[str, Any],
        seconds: float,
        processes: Processes,
    ) -> None:
        self._directory = Path(resolved(directory, "checkpoint_dir"))
        self._seconds = seconds
        self._processes = processes
        path = self._directory / "plan.json"
        with processes.error_barrier():
            if path.exists():
                self._compare(path, json.loads(json.dumps(plan)))
            elif processes.is_main:
                self._directory.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    Path(temporary).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")

        self._remove_unfinished()

    def finished(self, number: int) -> CordaFactors | None:
        """Returns the factors of a finished pass; None if the pass is not finished."""
        path = self._pass_file(number)
        return CordaFactors.load(path) if path.exists() else None

    def finish(self, number: int, factors: CordaFactors) -> None:
        """Save the factors of a pass, and delete its sums, which are no longer needed."""
        with self._processes.error_barrier():
            if self._processes.is_main:
                factors.save(self._pass_file(number))
        self._sums_file().unlink(missing_ok=True)

    def snapshots(self, number: int) -> Snapshots:
        """Returns the snapshots of the partial sums of a pass."""
        return Snapshots(self._sums_file(), number, self._seconds)

    def _pass_file(self, number: int) -> Path:
        return self._directory / f"pass-{number:04d}.safetensors"

    def _sums_file(self) -> Path:
        return self._directory / f"sums-{self._processes.rank}.safetensors"

    def _remove_unfinished(self) -> None:
        """Delete temporary files that were left over when writing was interrupted."""
        shared = ["plan.json", "pass-*"] if self._processes.is_main else []
        for name in (self._sums_file().name, *shared):
            for path in self._directory.glob(f".{name}.*.tmp"):
                path.unlink(missing_ok=True)

    def _compare(self, path: Path, plan: Mapping[str, Any]) -> None:
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a calibration plan: {error}") from error
        differing = sorted(k for k in {*plan, *found} if plan.get(k) != found.get(k))
        if differing:
            raise ValueError(
                f"checkpoint_dir={str(self._directory)!r} holds the checkpoint of another calibration: "
                f"{', '.join(differing)} differ. Use the same model and settings as before to resume "
                "it, or another folder to start anew."
            )


def identity(
    config: CordaConfig,
    methods: Sequence[str],
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    passes: Sequence[Sequence[Group]],
    dtype: torch.dtype,
    data: Mapping[str, Any],
    processes: Processes,
) -> dict[str, Any]:
    """Identity of a calibration: everything that its factors depend on, with weights as samples.

    Args:
        data: Properties that identify the calibration data.

    Returns:
        JSON-ready values by name; the names appear in the message if a checkpoint differs.
    """
    weights = hashlib.sha256()
    for parameter in full_parameters(model):
        weights.update(sample_of(parameter).numpy().tobytes())
    return {
        "methods": list(methods),
        "corda_weighting": config.corda_weighting,
        "corda_damping": config.corda_damping,
        "ranks": {name: rank_of(config, name) for name in targets},
        "model's weights": weights.hexdigest(),
        "dtype": str(dtype),
        "max_memory (passes)": [[group.leader for group in groups] for groups in passes],
        "number of processes": processes.count,
        **data,
    }


class Snapshots:
    """Partial sums of a running pass, written from time to time.

    Args:
        path: File of the snapshot.
        number: Number of the pass.
        seconds: Minimum time in seconds between two snapshots.
    """

    def __init__(self, path: Path, number: int, seconds: float) -> None:
        self._path = path
        self._number = number
        self._seconds = seconds
        self._last = time.monotonic()
        self._cost = 0.0
        self._digest = ""
        self._seen = 0
        self._expected: tuple[int, str] = (0, "")

    def read(self) -> tuple[int, dict[str, tuple[Tensor, int]]]:
        """Returns the number of counted batches, and sums and tokens by module; 0 and {} at first."""
        if not self._path.exists():
            return 0, {}
        try:
            with safe_open(self._path, framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                if state["pass"] != self._number:
                    return 0, {}
                tokens = state["tokens"]
                sums = {name: (file.get_tensor(name), tokens[name]) for name in tokens}
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{self._path} is not a snapshot of a calibration: {error}") from error
        self._expected = (state["batches"], state["data"])
        return state["batches"], sums

    def saw(self, batch: Mapping[str, Any]) -> None:
        """Record a batch, counted or skipped.

        Raises:
            ValueError: If the skipped batches are not those from which the sums were computed.
        """
        self._digest = hashlib.sha256((self._digest + digest_of(batch)).encode()).hexdigest()
        self._seen += 1
        if self._seen == self._expected[0] and self._digest != self._expected[1]:
            self._refuse()

    def saw_all(self) -> None:
        """Check the number of batches; to be called after the last one.

        Raises:
            ValueError: If the data has fewer batches than the sums were computed from.
        """
        if self._seen < self._expected[0]:
            self._refuse()

    def _refuse(self) -> None:
        raise ValueError(
            f"The calibration data differs from that of the interrupted run in its first "
            f"{self._expected[0]} batches, so the run cannot be resumed. Give the same data in the same "
            "order (unshuffled or with a fixed seed), or another checkpoint_dir to start anew."
        )

    def maybe_write(self, batches: int, sums: Mapping[str, CovarianceAccumulator]) -> None:
        """Write the sums of that many batches, unless the last snapshot is too recent."""
        now = time.monotonic()
        if now - self._last < max(self._seconds, self._cost / _SHARE if self._seconds else 0):
            return
        state = {
            "pass": self._number,
            "batches": batches,
            "data": self._digest,
            "tokens": {name: accumulator.tokens for name, accumulator in sums.items()},
        }
        tensors = {name: accumulator.sum.cpu() for name, accumulator in sums.items()}
        atomic_save(tensors, self._path, {"state": json.dumps(state)})
        self._last = time.monotonic()
        self._cost = self._last - now
