"""CorDA (context-oriented decomposition adaptation) as a PEFT method.

Importing this package registers the PEFT type `CORDA`, so that `get_peft_model`,
`PeftModel.from_pretrained` and `AutoPeftModel` accept a `CordaConfig` and load adapters saved from
one.

Method: CorDA, arXiv 2406.05223 (NeurIPS 2024).
"""

from typing import TYPE_CHECKING

from kprune_ext.common.version import installed_version
from kprune_ext.console.importing import on_import, public_names

if TYPE_CHECKING:
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
else:
    __getattr__, __dir__ = public_names(
        __name__,
        {
            "CordaCalibrationCallback": ".calibration.callback",
            "CordaConfig": ".config",
            "CordaExportCallback": ".export.callback",
            "CordaFactors": ".factors",
            "CordaModel": ".adapter.model",
            "CordaReport": ".analysis.report",
            "ModuleFactors": ".factors",
            "allocate_ranks": ".analysis.allocation",
            "apply_ranks": ".analysis.allocation",
            "calibrate": ".calibration.calibrate",
            "export_lora": ".export.export",
            "initialize_corda": ".calibration.initialize",
            "register_corda": ".adapter.registration",
            "report": ".analysis.report",
        },
    )

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
    "register_corda",
    "report",
]


def _register() -> None:
    from .adapter.registration import register_corda

    register_corda()


on_import(_register)
