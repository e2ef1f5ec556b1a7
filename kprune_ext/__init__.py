"""K-prune for transformers models: accurate structured pruning without retraining.

Importing the package registers the pruned model classes with transformers' Auto classes.
"""

from typing import TYPE_CHECKING

from .common.version import installed_version
from .console.importing import on_import, public_names

if TYPE_CHECKING:
    from .budget.latency import LatencyTable
    from .budget.latency_measurement import measure_latency
    from .callback import KPruneCallback
    from .config import KPruneConfig
    from .modeling.saved_report import load_report
    from .pruning import kprune
    from .report.report import KPruneReport
    from .report.rows import SubLayerReport
else:
    __getattr__, __dir__ = public_names(
        __name__,
        {
            "KPruneCallback": ".callback",
            "KPruneConfig": ".config",
            "KPruneReport": ".report.report",
            "LatencyTable": ".budget.latency",
            "SubLayerReport": ".report.rows",
            "kprune": ".pruning",
            "load_report": ".modeling.saved_report",
            "measure_latency": ".budget.latency_measurement",
        },
    )

__version__ = installed_version()

__all__ = [
    "KPruneCallback",
    "KPruneConfig",
    "KPruneReport",
    "LatencyTable",
    "SubLayerReport",
    "__version__",
    "kprune",
    "load_report",
    "measure_latency",
]


def _register() -> None:
    from .modeling.classes import register

    register()


on_import(_register)
