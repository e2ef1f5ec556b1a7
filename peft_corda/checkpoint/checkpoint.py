"""Checkpoint on disk, from which an interrupted calibration is resumed.

The folder holds the plan (`plan.json`), the factors of every finished pass (`pass-0000.safetensors`)
and, per process, the sums of the pass that was running (`sums-0.safetensors`). Each file is written
under a temporary name and then renamed, so that it is either complete or missing. Passes and sums hold
a digest of their plan, and are only taken up by the same one. While a calibration runs, a lock keeps
others out.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open

from kprune_ext.common.processes import Processes
from kprune_ext.files.locks import locked
from kprune_ext.files.writing import atomic_save, resolved, write_json

from ..factors import CordaFactors, contents_of
from .identity import LATER, WEIGHTS, plan_digest
from .snapshots import Snapshots, check_first_batches

_ABOUT = "calibration"  # entry of a pass's metadata


class Checkpoint:
    """The folder of one calibration.

    Args:
        directory: Folder of the checkpoint, which is created if it does not exist.
        plan: Everything that the result depends on, from `identity`, as JSON-ready values.
        seconds: Minimum time in seconds between two snapshots of a running pass.
        processes: Processes that take part; the main process writes the files that they share.
        data: Digests of this process's batches, if they are known in advance.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        plan: Mapping[str, Any],
        seconds: float,
        processes: Processes,
        data: Sequence[str] | None = None,
    ) -> None:
        self._directory = Path(resolved(directory, "checkpoint_dir"))
        self._plan: dict[str, Any] = json.loads(json.dumps(plan))
        self._seconds = seconds
        self._processes = processes
        self._data = data
        self._digest = plan_digest(self._plan)
        self._goes_on = False  # whether files without a digest belong to this plan
        self._done: Sequence[str] | None = None  # digests of the batches of finished passes
        self._running: Snapshots | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other calibrations out of the folder while the block runs.

        Raises:
            BlockingIOError: If another calibration is using the folder.
            ValueError: If the folder holds the checkpoint of another calibration. The message names
                the differences.
        """
        name = f"checkpoint_dir={str(self._directory)!r}"
        with ExitStack() as lock:
            exists = False
            with self._processes.error_barrier():
                if self._processes.is_main:
                    lock.enter_context(locked(str(self._directory / ".lock"), name, wait=False))
                    exists = (self._directory / "plan.json").exists()
            exists = bool(self._processes.largest(int(exists)))
            with self._processes.error_barrier():
                self._open(exists)
            yield

    def finished(self, number: int, modules: Mapping[str, int]) -> CordaFactors | None:
        """Returns the factors of a finished pass; None if the pass is not finished.

        Args:
            number: Number of the pass.
            modules: Rank by name of the modules of the pass.

        Raises:
            ValueError: If the file is damaged, or was computed from other data.
        """
        path, found = self._pass_file(number), None
        with self._processes.error_barrier():
            if self._processes.is_main and path.exists():
                found = self._own(path, number, modules)
        # All processes do what the main one does, even if they see the folder later.
        is_finished = self._processes.largest(int(found is not None))
        if not is_finished:
            return None
        with self._processes.error_barrier():
            found = found or CordaFactors.load(path)
            batches = _about(path).get("batches", [])
            if self._processes.rank < len(batches):
                self._done = batches[self._processes.rank]
                if self._data is not None:
                    check_first_batches(self._data, self._done)
        return found

    def finish(self, number: int, factors: CordaFactors) -> None:
        """Save the factors of a pass, and delete its sums, which are no longer needed."""
        seen = [] if self._running is None else self._running.seen
        batches = self._processes.gather(seen)
        with self._processes.error_barrier():
            if self._processes.is_main:
                tensors, metadata = contents_of(factors)
                about = {"plan": self._digest, "pass": number, "batches": batches}
                own = {**metadata, _ABOUT: json.dumps(about)}
                atomic_save(tensors, self._pass_file(number), own)
        self._sums_file().unlink(missing_ok=True)

    def snapshots(self, number: int) -> Snapshots:
        """Returns the snapshots of the partial sums of a pass."""
        self._running = Snapshots(
            self._sums_file(),
            number,
            self._seconds,
            plan=self._digest,
            goes_on=self._goes_on,
            data=self._data,
            done=self._done,
        )
        return self._running

    def _pass_file(self, number: int) -> Path:
        return self._directory / f"pass-{number:04d}.safetensors"

    def _sums_file(self) -> Path:
        return self._directory / f"sums-{self._processes.rank}.safetensors"

    def _open(self, exists: bool) -> None:
        """Compares the plan with the folder's, writes it if it is new, and removes leftovers."""
        path = self._directory / "plan.json"
        if exists:
            found = _plan_in(path)
            self._compare(found)
            self._goes_on = True
            if found != self._plan and self._processes.is_main:  # of version 0.1
                with suppress(OSError):  # finished work can be read in any case
                    write_json(path, self._plan)
        elif self._processes.is_main:
            write_json(path, self._plan)
        shared = ["plan.json", "pass-*"] if self._processes.is_main else []
        for name in (self._sums_file().name, *shared):
            for left in self._directory.glob(f".{name}.*.tmp"):
                left.unlink(missing_ok=True)

    def _own(self, path: Path, number: int, modules: Mapping[str, int]) -> CordaFactors | None:
        """The factors of a file of this calibration; None if it belongs to another one."""
        factors, about = CordaFactors.load(path), _about(path)
        if about:
            fits = (about.get("plan"), about.get("pass")) == (self._digest, number)
        else:  # written by version 0.1
            fits = self._goes_on and self._matches(factors, modules)
        if fits:
            return factors
        warnings.warn(
            f"{path} belongs to another calibration, so that pass {number + 1} is computed anew.",
            stacklevel=2,
        )
        return None

    def _matches(self, factors: CordaFactors, modules: Mapping[str, int]) -> bool:
        methods = self._plan["methods"]
        return (
            factors.modules.keys() == modules.keys()
            and list(factors.methods) == methods
            and factors.damping == self._plan["corda_damping"]
            and factors.weighting == self._plan["corda_weighting"]
            and all(
                factors.rank(name, method) == rank
                for name, rank in modules.items()
                for method in methods
            )
        )

    def _compare(self, found: Mapping[str, Any]) -> None:
        differing = {
            WEIGHTS if name.startswith(WEIGHTS) else name
            for name in {*self._plan, *found}
            if self._plan.get(name) != found.get(name) and not (name in LATER and name not in found)
        }
        if differing:
            raise ValueError(
                f"checkpoint_dir={str(self._directory)!r} holds the checkpoint of another calibration: "
                f"{', '.join(sorted(differing))} differ. Use the same model and settings as before to "
                "resume it, or another folder to start anew."
            )


def _plan_in(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(
            f"This process does not see {path}, which the main process does. Give all processes the "
            "same folder as checkpoint_dir, on a file system that they share."
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a calibration plan: {error}") from error


def _about(path: Path) -> dict[str, Any]:
    """What a pass says about its calibration; nothing in files of version 0.1."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {}).get(_ABOUT, "{}")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not say which calibration it belongs to: {error}") from error
