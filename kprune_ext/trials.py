"""What a search for the smallest good model has tried, as values and in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Trial:
    """One model that was scored.

    Attributes:
        reduction: Fraction that was to be removed; 0 for the model itself.
        score: Its score; None if so much cannot be removed.
        cost: Fraction of the pruned quantity (FLOPs, parameters, latency) that it has; None likewise.
        seconds: Time to prune and score it.
        note: Why there is no score.
    """

    reduction: float
    score: float | None
    cost: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class KPruneSearch:
    """Result of `kprune_to`.

    Attributes:
        model: The pruned model; None if even the smallest reduction costs too much.
        reduction: Fraction removed from it; 0.0 if nothing was pruned.
        limit: Score that it had to reach.
        greater_is_better: Whether a greater score is better.
        trials: Everything that was scored, by reduction, with the model itself first.
    """

    model: Any = field(repr=False)
    reduction: float
    limit: float
    greater_is_better: bool
    trials: tuple[Trial, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the model as plain values."""
        return {
            "reduction": self.reduction,
            "limit": self.limit,
            "greater_is_better": self.greater_is_better,
            "trials": [dict(vars(trial)) for trial in self.trials],
        }

    def __str__(self) -> str:
        sign = "at least" if self.greater_is_better else "at most"
        lines = [f"score wanted: {sign} {self.limit:.4g}", "", "reduction   score   left   seconds"]
        for trial in self.trials:
            mark = "  <- chosen" if trial.reduction == self.reduction else ""
            score = "–" if trial.score is None else f"{trial.score:.4g}"
            cost = "–" if trial.cost is None else f"{trial.cost:.1%}"
            lines.append(f"{trial.reduction:8.0%} {score:>8} {cost:>6} {trial.seconds:9.1f}{mark}")
        notes = [f"{trial.reduction:.0%}: {trial.note}" for trial in self.trials if trial.note]
        return "\n".join([*lines, *notes])


def read_trials(path: Path, about: Mapping[str, Any]) -> dict[float, Trial]:
    """Reads the trials of an interrupted search.

    Args:
        path: The file, which may not exist yet.
        about: What the search is of; the file must be of the same.

    Raises:
        ValueError: If the file is of another search, or cannot be read.
    """
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        trials = [Trial(**trial) for trial in stored["trials"]]
        before = stored["about"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not a file of a search ({error}). Pass another state_file, or remove it."
        ) from error
    same = json.loads(json.dumps(about))
    different = [name for name in same if before.get(name) != same[name]]
    if different:
        raise ValueError(
            f"{str(path)!r} is of a search with other {', '.join(different)}. Pass another state_file, "
            "or remove it to begin anew."
        )
    return {trial.reduction: trial for trial in trials}
