"""K-prune (arXiv 2308.03449): knowledge-preserving pruning without retraining."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures.tasks import Predict
from .budget.costs import unit_flops
from .budget.latency import LatencyTable
from .calibration.input_sums import InputsFile, inputs_file
from .common.memory import trim_memory
from .files.writing import check_output_file
from .judging.quality import compared, judged, predicted
from .judging.speed import measured_speed
from .model_layers.device_map import dispatch, own_weights
from .modeling.copying import become_plain, record_kept
from .preparation.config import KPruneConfig
from .preparation.given import given_config
from .preparation.run import PruningRun, prepared
from .progress import progress_over
from .report.making import HeldOut, make_report
from .report.quality import Quality, Speed
from .samples.sharing import processes_of
from .steps import (
    advance,
    measured_scores,
    measures_at,
    original_of,
    searched,
    tuned,
    uniform_numbers,
)
from .tuning.logit_scale import scale_logits
from .units.kept import kept_units
from .units.surgery import set_output, shrink


def kprune(
    model: PreTrainedModel,
    dataloader: Iterable[Any],
    config: KPruneConfig | None = None,
    *,
    predict: Predict | None = None,
    latency: LatencyTable | None = None,
    accelerator: Accelerator | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    reduction: float | None = None,
    covariances: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Prunes attention heads and feed-forward neurons, and tunes the remaining weights by regression.

    The sub-layers are pruned bottom-up, without training (arXiv 2308.03449, algorithm 1). For each one,
    the knowledge of its units and of those of all later sub-layers is measured, the global threshold
    that fits the budget is found, the units of this sub-layer below it are removed, and the output
    projection is fitted so that its output plus the residual stream equals the original model's. At the
    end, one factor on all logits brings class probabilities closer to the original model's.

    Args:
        model: A supported model (the error for others lists them), a model of a class of your own
            with `predict`, or a module with one such model inside: a SentenceTransformer, a
            CrossEncoder, or with `predict` a module of your own. It is left exactly as it was. It may
            be placed on several devices, or partly in CPU memory or on disk (`device_map`), as long as
            each transformer layer is on one device. The result is placed alike, except for weights that
            were on disk. Offloaded parts are pruned on the CPU.
        dataloader: Texts with `tokenizer`: a list, an iterator or a `datasets.Dataset` of strings, of
            pairs of strings, of chats (`messages`), of prompts with answers (`prompt`, `completion`) or
            of tokens. Or batches as mappings of tensors: `input_ids` and `attention_mask`
            `(batch, tokens)`, or `pixel_values`, and any other input of the model. Columns that
            the model does not take are ignored, except with `predict`, and labels are only used for
            the accuracy in the report. Entries with one value for each sample are cut into samples;
            others, such as an option, go with each as they are. Batch size and padding do not matter.
            For a causal language model, `labels` (batch, tokens)
            of -100 mark tokens, such as those of a prompt, whose predictions do not count.
        config: The options; by default half of an encoder's FLOPs, or of the parameters of a decoder's
            layers, are removed.
        predict: Function `(model, batch) -> logits` that replaces the default of the model's task. The
            logits are `(batch, classes)`, or `(batch, positions, classes)` for several predictions
            per sample. It is called with what is given as `model`, or with its copy, which it must
            run, and with a dict of all entries of a batch, for any number of its samples. The
            logits count as those of classes unless `config.problem_type` says otherwise.
        latency: Latency table from `kprune_ext.measure_latency`, for `metric="latency"`. By default
            latency is measured with 32 sequences of the calibration data's mean length.
        accelerator: Accelerator of a run with several processes, each of which calls this function.
            Each processes its share of the data, up to its share of `config.max_tokens`, and all return
            bitwise the same model. A plain `DataLoader` and texts are split among the processes; other
            iterables and prepared loaders are expected to give each process batches of its own. The
            model may be wrapped for data-parallel training. Without an accelerator, the process works
            alone.
        tokenizer: The model's tokenizer, where the data are texts. A SentenceTransformer or CrossEncoder
            has its own.
        max_length: Largest number of tokens per text; by default 512, or as many as the model takes. A
            language model reads longer texts in several parts; for others they are truncated.
        reduction: The option of that name, in place of a config.
        covariances: Path of a file for the covariances of the inputs of the pruned model's linear
            layers, from which `peft_corda.calibrate(pruned, config, covariances=...)` starts an adapter
            without another pass over the data. They are of the tokens that the weights are fitted to,
            which are those of `dataloader` up to `config.max_tokens`, without what `config.held_out`
            holds out, and of the linear layers inside the transformer layers, each once where
            several share an input. The safetensors file takes 4 bytes for each pair of inputs of a
            layer, at most 0.4 GB for SmolLM2-135M and 22 GB for a Llama of 7B. It is written layer by
            layer, so memory holds what one sub-layer adds to it.
        progress: Whether to show a progress bar, in the main process.

    Returns:
        A copy of what was given, with smaller matrices, in evaluation mode, that transformers can
        save, load and train. What a checkpoint cannot hold of it, such as another activation function
        or a forward of your own, is kept in memory, and a warning before the work names it. The
        `kprune_report` of the pruned model describes what was kept. The quantity that
        `config.metric` names (in encoders by default FLOPs, where a multiply-add counts twice, see
        `kprune_ext.budget.flops`) is at most (1 − reduction) of the original model's.

    Raises:
        ValueError: If the model is not supported, the calibration data are empty or have no unmasked
            token, the budget leaves no unit, or activations are NaN or infinite.
        TypeError: If a batch is not a mapping of tensors, or a projection is not a plain linear layer.
        OSError: If the file of covariances cannot be written.
        RuntimeError: If another process failed; the message says how.
    """
    config = given_config(config, reduction)
    if covariances is not None:
        with processes_of(accelerator).error_barrier():
            check_output_file(covariances, "covariances")
    with ExitStack() as block:
        if torch.is_inference_mode_enabled():  # gradients are needed, and so are ordinary tensors
            block.enter_context(torch.inference_mode(False))
        run = block.enter_context(
            prepared(
                model,
                dataloader,
                config,
                predict=predict,
                latency=latency,
                accelerator=accelerator,
                tokenizer=tokenizer,
                max_length=max_length,
            )
        )
        inputs = None
        if covariances is not None:
            inputs = block.enter_context(
                inputs_file(covariances, run.given.path, run.student, run.processes)
            )
        before = judged(run)
        outcome = prune_sublayers(run, progress=progress, inputs=inputs)
        found, signal = predicted(run), run.signal
        if run.config.scale_logits and not signal.next_tokens:
            outcome.logit_scale = scale_logits(
                run.stack, run.streams, signal.predict, found, signal.problem, run.processes
            )
        after = judged(run)
        outcome.losses = (before.loss, after.loss)
        outcome.quality = compared(run, before, after, found)
        outcome.speed = measured_speed(run)
    return _finished(run, outcome)


@dataclass
class Outcome:
    """Result of the pruning loop.

    Attributes:
        kept: Indices of the units kept, per sub-layer.
        errors: Relative error of the fit, per sub-layer.
        logit_scale: The factor on all logits, or None.
        losses: Loss on held-out tokens before and after, in nats a token; None for other tasks.
        quality: Agreement with the original, and accuracy; None if nothing could be compared.
        speed: Time of a forward pass; None if it was not measured.
    """

    kept: list[list[int]] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    logit_scale: float | None = None
    losses: tuple[HeldOut | None, HeldOut | None] = (None, None)
    quality: Quality | None = None
    speed: Speed | None = None


def prune_sublayers(
    run: PruningRun,
    keep: Sequence[Sequence[int]] | None = None,
    *,
    progress: bool = False,
    inputs: InputsFile | None = None,
) -> Outcome:
    """Prunes the sub-layers bottom-up (algorithm 1); the student is changed in place.

    Args:
        run: The run, from `prepared`.
        keep: Numbers of the units to keep, per sub-layer, chosen by something else than knowledge; None
            to measure knowledge and search.
        progress: Whether to show a progress bar, in the main process.
        inputs: File for the sums of the inputs of the pruned linear layers, if they are wanted.
    """
    outcome, left = Outcome(), run.budget.limit
    scores: list[Tensor] = []
    sizes: dict[str, int] | None = None
    original = run.teacher[0]
    measured = [keep is None and measures_at(run, step) for step in range(len(run.student))]
    silent = not (progress and run.processes.is_main)
    for step in progress_over(run.student, measured, disable=silent):
        target = run.student[step]
        if measured[step]:
            scores = measured_scores(run, step)
        if keep is None:
            sizes = uniform_numbers(run, scores) if step == 0 else sizes
            chosen = searched(run, step, scores, left, sizes)
        else:
            chosen = list(keep[step])
        original = original_of(run.teacher[step], target, original)
        shrink(target, chosen)
        fit = tuned(run, original, target)
        set_output(target, fit.weight, fit.bias)
        advance(run, target, inputs)
        left -= float(run.budget.costs[step][len(chosen)])
        scores = scores[1:]
        outcome.kept.append(chosen)
        outcome.errors.append(fit.error)
        del fit  # before the next step allocates its own
        trim_memory()
    own_weights(run.whole, run.given.whole)  # those that were not pruned
    return outcome


def _finished(run: PruningRun, outcome: Outcome) -> Any:
    """Returns the pruned model, with its record and report."""
    kept, budget, config = outcome.kept, run.budget, run.config
    record_kept(run.pruned, zip(kept[::2], kept[1::2], strict=True))
    units = None
    if config.layout == "uniform":
        units = kept_units(run.pruned.config)
        become_plain(run.whole, run.pruned)
    _copy_requires_grad(run.given.whole, run.whole)
    pruned: Any = dispatch(run.pruned, run.device_map)
    flops = [unit_flops(run.model, sublayer, budget.length) for sublayer in run.teacher]
    pruned.kprune_report = make_report(
        run.model,
        pruned,
        zip(run.teacher, run.student, flops, outcome.errors, strict=True),
        metric=config.metric or "flops",
        reduction=config.reduction,
        costs=budget.costs,
        budget=budget.limit,
        length=budget.length,
        samples=run.data.count,
        tokens=run.data.tokens,
        logit_scale=outcome.logit_scale,
        losses=outcome.losses,
        quality=outcome.quality,
        speed=outcome.speed,
        kept=units,
    )
    return run.whole


def _copy_requires_grad(model: nn.Module, pruned: nn.Module) -> None:
    # Tied parameters are included: the tie breaks if they are on two devices.
    every = model.named_parameters(remove_duplicate=False)
    trainable = {name: parameter.requires_grad for name, parameter in every}
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(trainable[name])
