"""The subcommands `peft-corda init` and `peft-corda export`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import PeftModel, get_peft_model

from kprune_ext.common.files import check_distinct, check_output_folder, replacing_folder

from ..config import CordaConfig
from ..export.export import export_lora
from ..factors import CordaFactors
from .base_model import PEFT_TYPES, check_options, load_model
from .calibrate import calibrated

if TYPE_CHECKING:
    from .options import ExportOptions, InitOptions


def run_export(options: ExportOptions) -> str:
    """Run `peft-corda export`, which writes a plain LoRA adapter.

    Raises:
        ValueError, OSError: If `export_lora` raises them; nothing is written then.
    """
    export_lora(options.src, options.dst, options.rank, options.dtype)
    print(f"Wrote {options.dst}. Load it with PeftModel.from_pretrained(model, {options.dst!r}).")
    return options.dst


def run_init(options: InitOptions) -> str:
    """Run `peft-corda init`, which writes an untrained adapter that contains its start.

    Raises:
        ValueError, OSError: If an option or file is invalid; nothing is written then.
    """
    if (options.factors is None) == (options.data is None):
        raise ValueError(
            "Give exactly one of factors (a file written by peft-corda calibrate) and data."
        )
    check_output_folder(options.output, "output")
    inputs = ("model", "factors", "data", "checkpoint_dir")
    check_distinct({"output": options.output}, {name: getattr(options, name) for name in inputs})
    check_options(options)
    config = _config(options)
    if options.data is not None:
        model, _ = calibrated(options, options.data, config, (config.method_for(),))
    else:
        assert options.factors is not None  # one of the two is given
        factors = CordaFactors.load(options.factors)
        config.corda_factors, config.corda_damping = factors, factors.damping
        model = load_model(options)
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    with replacing_folder(options.output) as folder:
        adapted.save_pretrained(folder)
    print(
        f"Wrote {options.output}. Train it with "
        f"PeftModel.from_pretrained(model, {options.output!r}, is_trainable=True)."
    )
    return options.output


def _config(options: InitOptions) -> CordaConfig:
    return CordaConfig(
        r=options.r,
        lora_alpha=options.r if options.lora_alpha is None else options.lora_alpha,
        rank_pattern=options.rank_pattern or {},
        alpha_pattern=options.alpha_pattern or {},
        use_rslora=options.use_rslora,
        lora_dropout=options.lora_dropout,
        bias=options.bias,
        target_modules=options.target_modules,
        exclude_modules=options.exclude_modules,
        modules_to_save=options.modules_to_save,
        task_type=PEFT_TYPES[options.task],
        revision=options.revision,
        corda_method=options.corda_method,
        corda_scaling=options.corda_scaling,
        corda_weighting=options.corda_weighting,
        corda_damping=options.corda_damping,
    )
