"""K-prune for transformers models: accurate structured pruning without retraining.

Importing the package registers the pruned model classes with transformers' Auto classes.
"""

from typing import TYPE_CHECKING, Any

from .budget.latency import LatencyTable
from .budget.latency_measurement import measure_latency
from .budget_search import kprune_to
from .common.version import installed_version
from .modeling.classes import register as _register
from .modeling.saved_report import load_report
from .preparation.config import KPruneConfig
from .pruning import kprune
from .report.report import KPruneReport
from .report.rows import SubLayerReport
from .trials import KPruneSearch

if TYPE_CHECKING:
    from .callback import KPruneCallback

__version__ = installed_version()

__all__ = [
    "KPruneCallback",
    "KPruneConfig",
    "KPruneReport",
    "KPruneSearch",
    "LatencyTable",
    "SubLayerReport",
    "__version__",
    "kprune",
    "kprune_to",
    "load_report",
    "measure_latency",
]

_register()


def __getattr__(name: str) -> Any:
    # On demand: the Trainer callback imports much of transformers that pruning does not need.
    if name == "KPruneCallback":
        from .callback import KPruneCallback

        return KPruneCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
