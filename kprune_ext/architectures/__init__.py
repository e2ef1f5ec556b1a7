"""The only place that names a model family: a table of rows, and the tasks of their heads."""

from .row import Architecture, SubLayerPaths
from .table import ARCHITECTURES, find_architecture
from .tasks import TASKS, Task

__all__ = ["ARCHITECTURES", "TASKS", "Architecture", "SubLayerPaths", "Task", "find_architecture"]
