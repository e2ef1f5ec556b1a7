"""Supported model families, named only here: a table with a row per family, and task heads."""

from .row import Architecture, SubLayerPaths
from .table import ARCHITECTURES, find_architecture
from .tasks import TASKS, Task

__all__ = ["ARCHITECTURES", "TASKS", "Architecture", "SubLayerPaths", "Task", "find_architecture"]
