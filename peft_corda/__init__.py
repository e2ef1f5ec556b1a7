"""CorDA (context-oriented decomposition adaptation) as a PEFT method.

Importing this package registers the PEFT type `CORDA`, so that `get_peft_model`,
`PeftModel.from_pretrained` and `AutoPeftModel` accept a `CordaConfig` and load adapters saved from
one.

Method: CorDA, arXiv 2406.05223 (NeurIPS 2024).
"""

from kprune_ext.common.version import installed_version

from .adapter.model import CordaModel
from .adapter.registration import register_corda
from .analysis.allocation import allocate_ranks, apply_ranks
from .analysis.report import CordaReport, report
from .calibration.calibrate import calibrate
from .calibration.callback import CordaCalibrationCallback
from .calibration.initialize import initialize_corda
from .config import CordaConfig
from .export.callback import CordaExportCallback
from .export.export import export_lora
from .factors import CordaFactors, ModuleFactors

__version__ = installed_version()

__all__ = [
    "CordaCalibrationCallback",
    "CordaConfig",
    "CordaExportCallback",
    "CordaFactors",
    "CordaModel",
    "CordaReport",
    "ModuleFactors",
    "allocate_ranks",
    "apply_ranks",
    "calibrate",
    "export_lora",
    "initialize_corda",
    "report",
]

register_corda()
