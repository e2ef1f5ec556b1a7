"""K-prune for transformers encoders: accurate structured pruning without retraining.

Importing the package registers the pruned model classes with transformers' Auto classes.
"""

from kprune_ext.budget import measure_latency
from kprune_ext.callback import KPruneCallback
from kprune_ext.config import KPruneConfig
from kprune_ext.cost import LatencyTable
from kprune_ext.modeling import register as _register
from kprune_ext.pruning import kprune
from kprune_ext.report import KPruneReport, SubLayerReport
from kprune_ext.saved_report import load_report

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
