"""`calibrate`: from a model and calibration data to factors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kprune_ext.common.memory import trim_memory
from kprune_ext.common.processes import Processes
from kprune_ext.files.locks import only_user_of

from ..config import CordaConfig
from ..decomposition.sketch import InputSketch
from ..factors import CordaFactors, ModuleFactors
from .collect import collect_covariances
from .decompose import factorise
from .from_covariances import check_source, factors_from
from .preparation import Calibration, prepare


def calibrate(
    model: nn.Module,
    config: CordaConfig,
    dataloader: Iterable[Any] | None = None,
    max_memory: int | str | None = None,
    *,
    covariances: str | os.PathLike[str] | None = None,
    keep: Iterable[Any] | None = None,
    methods: Sequence[str] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 120.0,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    max_length: int | None = None,
    progress: bool = True,
    verbose: bool | None = None,
) -> CordaFactors:
    """Find the directions that the adapters of `config` start from (CorDA, Section 3).

    Args:
        model: Base model, or a `PeftModel` around it (which is run with its adapters as they are). It
            may also be wrapped by `DistributedDataParallel`, sharded by `fully_shard` or DeepSpeed
            ZeRO-3, or offloaded by accelerate. Its weights, mode, hooks and gradients are left as
            they were.
        config: Config whose target modules, ranks, method, weighting and damping are used. The result
            is also assigned to `config.corda_factors`, so that `get_peft_model(model, config)` can
            follow.
        dataloader: Data that represent the knowledge to keep (`kpm`) or the task (`ipm`). Texts with
            `tokenizer`: a list, an iterator or a `datasets.Dataset` of strings, of prompts with answers
            (`prompt`, `completion`), of chats (`messages`) or of tokens. Or batches, as a
            `DataLoader` or collator yields them: mappings of tensors or arrays, padded, packed or
            neither. Tokens where `attention_mask` is 0 do not count. Labels are ignored, except that
            the decoder of an encoder-decoder model is run on them as in training, where -100 and
            padding do not count. Empty batches are skipped. A few hundred sequences are usual. Under
            several processes, each passes its own share.
        covariances: In place of data, path of a file of the covariances of this model's layers, which
            `kprune_ext.kprune(..., covariances=path)` writes while it prunes the model. They are read
            one at a time, and the model is not run. Target modules must be linear layers inside the
            transformer layers. The result is that of a calibration on the tokens that the file is of.
        max_memory: Memory limit of the statistics at a time, in bytes or as `"500MB"`, `"4GiB"`. The
            default is an eighth of the size of the model's weights (a quarter where every pass has to
            run the full model again). If the statistics need more, the layers are calibrated in
            several passes over the data, with the same result. A pass starts at the block where the
            last one ended, if the model's blocks form a plain chain and the hidden states also fit;
            otherwise it starts at the first block. The hidden states of a model on an accelerator are
            kept in host memory and do not count. The data must be the same in every pass (an iterator
            is kept in memory for this).
        keep: With `corda_method="sc_lora"`, batches of the knowledge to keep; `dataloader` is then the
            task. The statistics take twice the memory. The sketches, of which `forgetting` is
            measured, are those of `keep`.
        methods: Methods to find directions for: `"kpm"`, `"ipm"` or both, or one of the others. The
            default is the method of the config.
        checkpoint_dir: Folder for finished passes and, every `checkpoint_seconds`, partial sums. If
            called again with the same arguments, an interrupted calibration is resumed from there,
            with the same result. Several processes need the same folder.
        checkpoint_seconds: Minimum time in seconds between two snapshots of partial sums; 0 for one
            after each batch.
        dtype: Dtype in which sums are computed: `torch.float32` or, for twice the memory and time,
            `torch.float64`. Covariances of a file are converted to it.
        tokenizer: The model's tokenizer, where the data are texts.
        max_length: Largest number of tokens per text; by default 512, or as many as the model takes. A
            causal language model reads longer texts in several parts; for others they are truncated.
        progress: Whether to print the plan and show a progress bar with the time left.
        verbose: Earlier name of `progress`.

    Returns:
        The factors on the CPU, the same on all processes.

    Raises:
        TypeError: If `config` is not a `CordaConfig`, or a batch is not a mapping.
        FileNotFoundError: If there is no file `covariances`.
        ValueError: If an argument is out of range, or `covariances` is the file of another model or
            lacks a target module; if no module matches, or one is unsupported or too
            small for its rank; if no batch reaches it; if the data is empty, masked out, of a wrong
            shape, or gives NaN or infinite activations; if `max_memory` is too small for a single
            layer; if `checkpoint_dir` belongs to another calibration; or if the model is
            tensor-parallel or wrapped by FSDP1.
        BlockingIOError: If another calibration is using `checkpoint_dir`.
        RuntimeError: If another process failed, ended or did not respond in time, or another thread is
            working on the same model.
    """
    check_source(
        dataloader, covariances, max_memory=max_memory, keep=keep, checkpoint_dir=checkpoint_dir
    )
    with only_user_of(model, "calibrate"):
        shows = progress if verbose is None else verbose
        if covariances is not None:
            factors = factors_from(covariances, model, config, methods, dtype, shows)
        else:
            assert dataloader is not None  # as checked
            run = prepare(
                model,
                config,
                dataloader,
                max_memory,
                keep=keep,
                methods=methods,
                checkpoint_dir=checkpoint_dir,
                checkpoint_seconds=checkpoint_seconds,
                dtype=dtype,
                tokenizer=tokenizer,
                max_length=max_length,
                progress=shows,
            )
            with run.held(), run.shown() as shown:
                factors = _run(shown, config)
        if Processes().is_main:
            _warn_if_few(factors)
    config.corda_factors = factors
    return factors


def _warn_if_few(factors: CordaFactors) -> None:
    """Warns where a covariance is of fewer tokens than it has dimensions."""
    few = [(name, m) for name, m in factors.modules.items() if m.tokens < m.shape[1]]
    if few:
        name, module = max(few, key=lambda item: item[1].shape[1] / max(item[1].tokens, 1))
        others = f" (and {len(few) - 1} other modules)" if len(few) > 1 else ""
        warnings.warn(
            f"The calibration data have {module.tokens:,} tokens, fewer than the {module.shape[1]:,} "
            f"inputs of {name}{others}, so most of the directions rest on damping alone. Pass at "
            f"least {10 * module.shape[1]:,} tokens.",
            UserWarning,
            stacklevel=3,
        )


def _run(run: Calibration, config: CordaConfig) -> CordaFactors:
    """Run the passes that are not finished yet."""
    found: dict[str, ModuleFactors] = {}
    sketches: dict[str, InputSketch] = {}
    for number in range(len(run.plan.passes)):
        part, bar = run.finished(number, config), run.options.progress
        if bar is not None and part is not None:
            bar.skip(number)
        if part is None:
            if bar is not None:
                bar.begin(number)
            part = _run_pass(run, number, config)
            run.finish(number, part)
        found.update(part.modules)
        sketches.update(part.sketches)
    return CordaFactors(
        modules={name: found[name] for name in run.targets},
        damping=config.corda_damping,
        weighting=config.corda_weighting,
        sketches=sketches,
    )


def _run_pass(run: Calibration, number: int, config: CordaConfig) -> CordaFactors:
    """Collect the covariances of one pass, and decompose them."""
    groups, options = run.plan.passes[number], run.pass_options(number)
    covariances = collect_covariances(
        run.runner, run.batches, groups, options, run.plan.carried(number)
    )
    kept = None
    if run.keep is not None:
        own = replace(options, snapshots=None)
        kept = collect_covariances(run.runner, run.keep, groups, own)
    trim_memory()
    factors = factorise(
        groups, covariances, run.targets, config, run.methods, run.processes, options.progress, kept
    )
    trim_memory()
    return factors
