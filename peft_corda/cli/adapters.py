"""The subcommands `peft-corda init` and `peft-corda export`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model

from kprune_ext.files.writing import check_distinct, check_output_folder, replacing_folder

from ..analysis.spectra import pick_method
from ..config import CordaConfig
from ..export.export import export_lora
from ..factors import CordaFactors
from .base_model import PEFT_TYPES, check_options, check_sources, load_model
from .calibrate import calibrated

if TYPE_CHECKING:
    from .options import ExportOptions, InitOptions

#: Rank of an adapter if neither the options nor a factors file say.
_DEFAULT_RANK = 16


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
    method = options.corda_method or "kpm"
    check_sources(options, method, factors=options.factors)
    check_output_folder(options.output, "output")
    inputs = ("model", "factors", "data", "covariances", "keep", "checkpoint_dir")
    check_distinct({"output": options.output}, {name: getattr(options, name) for name in inputs})
    check_options(options)
    if options.factors is None:
        chosen = replace(
            options,
            r=_DEFAULT_RANK if options.r is None else options.r,
            corda_method=method,
            corda_weighting=options.corda_weighting or "covariance",
        )
        config = _config(chosen)
        model, _ = calibrated(options, config, (config.method_for(),))
    else:
        factors = CordaFactors.load(options.factors)
        chosen = with_values_of(factors, options)
        config = _config(chosen)
        config.corda_factors, config.corda_damping = factors, factors.damping
        model = load_model(options)
        print(_taken(chosen, options))
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    with replacing_folder(options.output) as folder:
        adapted.save_pretrained(folder)
    print(
        f"Wrote {options.output}. Train it with "
        f"PeftModel.from_pretrained(model, {options.output!r}, is_trainable=True)."
    )
    return options.output


def with_values_of(factors: CordaFactors, options: InitOptions) -> InitOptions:
    """Returns the options with those that are not given taken from the factors.

    Where the factors of some modules are of a smaller rank than others, `rank_pattern` says so.

    Raises:
        ValueError: If the factors do not hold the method that is asked for.
    """
    held = factors.methods
    method = options.corda_method or (held[0] if len(held) == 1 else "kpm")
    pick_method(factors, method)
    weighting = options.corda_weighting or factors.weighting
    given: dict[str, Any] = {"corda_method": method, "corda_weighting": weighting}
    if options.r is None:
        ranks = {name: factors.rank(name, method) for name in factors.modules}
        given["r"] = most = max(ranks.values())
        if options.rank_pattern is None:
            given["rank_pattern"] = {n: rank for n, rank in ranks.items() if rank < most} or None
    return replace(options, **given)


def _taken(chosen: InitOptions, options: InitOptions) -> str:
    """Says in a line which rank and scaling the adapter has."""
    assert chosen.r is not None
    alpha = chosen.r if chosen.lora_alpha is None else chosen.lora_alpha
    where = "" if options.r is not None else f" from {options.factors}"
    paper = "" if alpha == chosen.r else "; the paper's setting is lora_alpha = r"
    return f"The adapter has {chosen.corda_method}, r={chosen.r}{where}, lora_alpha={alpha}{paper}."


def _config(options: InitOptions) -> CordaConfig:
    assert options.r is not None and options.corda_weighting is not None  # chosen by now
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
        corda_beta=options.corda_beta,
    )
