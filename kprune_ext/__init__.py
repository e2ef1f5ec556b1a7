"""K-prune for transformers encoders: accurate structured pruning without retraining.

Importing the package registers the pruned model classes with transformers' Auto classes.
"""

from .budget.latency import LatencyTable
from .budget.latency_measurement import measure_latency
from .callback import KPruneCallback
from .config import KPruneConfig
from .modeling.classes import register as _register
from .modeling.saved_report import load_report
from .pruning import kprune
from .report.report import KPruneReport
from .report.rows import SubLayerReport

__version__ = "0.1.0"

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

_register()
