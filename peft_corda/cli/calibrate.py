"""The subcommand `peft-corda calibrate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoConfig, AutoTokenizer

from kprune_ext.common.memory import available_memory
from kprune_ext.common.processes import Processes
from kprune_ext.common.text_data import Batch, load_rows, packed_batches, padded_batches, read_texts
from kprune_ext.files.input_sums import InputSums
from kprune_ext.files.writing import check_output_files, replacing

from ..analysis.report import CordaReport, report
from ..calibration.calibrate import calibrate
from ..config import CordaConfig
from ..decomposition.directions import METHODS
from ..factors import CordaFactors
from .base_model import PEFT_TYPES, check_options, check_sources, load_model, model_source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from .options import CalibrateOptions, ModelOptions


def run_calibrate(options: CalibrateOptions) -> CordaFactors:
    """Run `peft-corda calibrate`, which writes the factors and prints a summary.

    Raises:
        ValueError, OSError: If an option or file is invalid; nothing is written then.
    """
    methods = METHODS if options.corda_method == "both" else (options.corda_method,)
    config = CordaConfig(
        r=options.r,
        corda_method=methods[0],
        corda_damping=options.corda_damping,
        corda_beta=options.corda_beta,
        corda_weighting=options.corda_weighting,
        target_modules=options.target_modules,
        exclude_modules=options.exclude_modules,
        rank_pattern=options.rank_pattern or {},
        task_type=PEFT_TYPES[options.task],
    )
    check_options(options)
    outputs = {"output": options.output, "report": options.report}
    check_sources(options, methods[0])
    inputs = ("data", "covariances", "keep", "model", "checkpoint_dir")
    check_output_files(outputs, {name: getattr(options, name) for name in inputs})
    _, factors = calibrated(options, config, methods)
    reports = [report(factors, config, method) for method in methods]
    _write(factors, options.output, reports, options.report)
    for own in reports:
        print(own)
    print(
        f"Wrote {options.output}. Use it with CordaConfig(corda_factors={options.output!r}, ...)."
    )
    return factors


def calibrated(
    options: ModelOptions, config: CordaConfig, methods: Sequence[str]
) -> tuple[nn.Module, CordaFactors]:
    """Returns the base model, and the factors of a calibration on the data or covariances."""
    # Cheap steps come first, so that a mistake is found before the model is loaded.
    if options.covariances is not None:
        InputSums.open(options.covariances)
        model = load_model(options)
        return model, calibrate(model, config, covariances=options.covariances, methods=methods)
    assert options.data is not None  # as checked
    source = model_source(options)
    about = AutoConfig.from_pretrained(options.model, **source)
    tokenizer = AutoTokenizer.from_pretrained(options.model, **source)
    batches = _batches(options, options.data, tokenizer, about)
    keep = None
    if options.keep is not None:
        keep = _batches(options, options.keep, tokenizer, about)
    model = load_model(options)
    factors = calibrate(
        model,
        config,
        batches,
        _memory(options, model),
        keep=keep,
        methods=methods,
        checkpoint_dir=options.checkpoint_dir,
    )
    return model, factors


def _memory(options: ModelOptions, model: nn.Module) -> int | str | None:
    """Returns the memory limit: half of what is free, unless it must be the same later or elsewhere.

    A calibration that is resumed, and all processes of one, need the same passes and so the same limit.
    """
    if options.max_memory is not None or Processes().count > 1:
        return options.max_memory
    if options.checkpoint_dir is not None:
        print(
            "max_memory is an eighth of the model's size, so that the calibration can be resumed. With "
            "more memory, fewer passes may do: pass --max_memory.",
            file=sys.stderr,
        )
        return None
    parameter = next(model.parameters())
    limit = available_memory(parameter.device) // 2
    if limit < sum(p.numel() * p.element_size() for p in model.parameters()) // 8:
        return None  # scarce: the default is as much as is needed
    print(
        f"max_memory is {limit / 2**30:.1f} GiB, half of what is free on {parameter.device}.",
        file=sys.stderr,
    )
    return limit


def _batches(
    options: ModelOptions, data: str, tokenizer: PreTrainedTokenizerBase, about: PretrainedConfig
) -> list[Batch]:
    _check_length(options.max_length, about)
    start = _decoder_start(options, about)
    rows = load_rows(data, name=options.data_name, split=options.split, whole_texts=options.pack)
    fields = [_listed(options.text_field)]
    if options.target_field is not None:
        fields.append(_listed(options.target_field))
    texts = read_texts(rows, fields, seed=options.seed)
    sizes = (options.num_samples, options.max_length, options.batch_size)
    if options.pack:
        return packed_batches(texts, tokenizer, *sizes, seed=options.seed)
    return padded_batches(texts, tokenizer, *sizes, decoder_start=start)


def _check_length(max_length: int, about: PretrainedConfig) -> None:
    most = getattr(about.get_text_config(), "max_position_embeddings", None)
    if most is not None and 0 < most < max_length:
        raise ValueError(
            f"max_length={max_length} is more than the {most} positions of the model. Lower it."
        )


def _decoder_start(options: ModelOptions, about: PretrainedConfig) -> int | None:
    """First token of the decoder's text; None for models that read one text."""
    if not about.is_encoder_decoder:
        if options.target_field is not None:
            raise ValueError(
                "target_field is for encoder-decoder models, but this model reads one text. Leave it "
                "out; several fields of one text are given as text_field."
            )
        return None
    if options.target_field is None or options.pack:
        raise ValueError(
            "The model is an encoder-decoder, which reads two texts. Name the field with the decoder's "
            "text as target_field, and leave out pack."
        )
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        token = getattr(about, name, None)
        if token is not None:
            return token
    raise ValueError("The model's config has no decoder_start_token_id. Set it and save the model.")


def _listed(fields: list[str] | str) -> list[str]:
    return [fields] if isinstance(fields, str) else fields


def _write(
    factors: CordaFactors, output: str, reports: list[CordaReport], report_path: str | None
) -> None:
    """Write both files, or neither."""
    if report_path is None:
        factors.save(output)
        return
    contents: Any = reports[0].to_dict()
    if len(reports) > 1:
        contents = {own.method: own.to_dict() for own in reports}
    with replacing(report_path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(contents, file, indent=1)
        factors.save(output)
