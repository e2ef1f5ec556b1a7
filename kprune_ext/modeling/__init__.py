"""Pruned models as ordinary checkpoints.

The classes of pruned models, such as `KPruneBertForSequenceClassification`, are members of this
package.
"""

from . import classes
from .checkpoints import Checkpoints
from .classes import UnevenLayers, model_task, register
from .copying import uneven_copy
from .saved_report import load_report

__all__ = [
    "Checkpoints",
    "UnevenLayers",
    "load_report",
    "model_task",
    "register",
    "uneven_copy",
]

globals().update(classes.DEFINED)
