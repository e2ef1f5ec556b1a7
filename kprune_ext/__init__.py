"""K-prune for transformers models: accurate structured pruning without retraining.

Importing the package registers the pruned model classes with transformers' Auto classes.
"""

from typing import TYPE_CHECKING

from .common.version import installed_version
from .console.importing import on_import, public_names

if TYPE_CHECKING:
    from .budget.latency import LatencyTable
    from .budget.latency_measurement import measure_latency
    from .budget_search import kprune_to
    from .callback import KPruneCallback
    from .modeling.saved_report import load_report
    from .preparation.config import KPruneConfig
    from .pruning import kprune
    from .report.report import KPruneReport
    from .report.rows import SubLayerReport
    from .trials import KPruneSearch
else:
    __getattr__, __dir__ = public_names(
        __name__,
        {
            "KPruneCallback": ".callback",
            "KPruneConfig": ".preparation.config",
            "KPruneReport": ".report.report",
            "KPruneSearch": ".trials",
            "LatencyTable": ".budget.latency",
            "SubLayerReport": ".report.rows",
            "kprune": ".pruning",
            "kprune_to": ".budget_search",
            "load_report": ".modeling.saved_report",
            "measure_latency": ".budget.latency_measurement",
        },
    )

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


def _register() -> None:
    from .modeling.classes import register

    register()


on_import(_register)
