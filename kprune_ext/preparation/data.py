"""Calibration data as the user has them, as batches of the model that was given."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.data import Encoding, as_batches, sequence_length
from ..common.data.examples import Example, Pair, Text
from ..common.processes import Processes
from ..model_layers.device_map import input_device
from ..model_layers.inputs import Entries, Inputs
from ..model_layers.layer_stack import LayerStack
from ..samples.samples import CalibrationData
from ..samples.sharing import shared_data
from ..units.sublayers import SubLayer
from .config import KPruneConfig
from .given import Given, is_from

_BATCH_SIZE = 16


def batches_for(
    given: Given,
    data: Any,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterable[Any]:
    """Returns calibration data as batches.

    Args:
        given: What the user gave to be pruned. A SentenceTransformer or CrossEncoder tokenises texts in
            its own way, with its default prompt.
        data: The data, as for `kprune`.
        tokenizer: The model's tokenizer, for texts.
        max_length: Largest number of tokens per sequence; None for 512, or as many as the model and
            its tokenizer take.
        part: Number of this process and number of processes, which take turns at examples.

    Raises:
        TypeError: If the data are a single text or nothing that holds examples.
        ValueError: If `max_length` is no number of tokens.
    """
    own = _own_collate(given.whole) if tokenizer is None else None
    encoding = Encoding(
        tokenizer,
        sequence_length(given.model.config, tokenizer, max_length),
        _BATCH_SIZE,
        "decoder" if given.predicts_next_tokens else "encoder",
        labels=not given.predicts_next_tokens,
    )
    return as_batches(data, encoding, collate=own, part=part)


def collected(
    given: Given,
    stack: LayerStack,
    batches: Iterable[Any],
    config: KPruneConfig,
    processes: Processes,
) -> CalibrationData:
    """Collects this process's samples, as many as the options say.

    Args:
        given: What the user gave to be pruned.
        stack: Layer stack of the copy.
        batches: This process's batches, from `batches_for`.
        config: The options, with a value in place of every None that depends on the model.
        processes: The processes that prune the model jointly.

    Raises:
        TypeError, ValueError: As `shared_data`.
    """
    return shared_data(
        given.model,
        batches,
        max_tokens=config.max_tokens,
        seed=config.seed,
        scored=(config.score_fraction or 1.0, config.min_score_samples or 1),
        image_tokens=lambda inputs: image_tokens(stack, inputs),
        runs=(lambda inputs: run_whole(given, inputs)) if given.is_own else None,
        processes=processes,
        causal=given.architecture.is_causal,
        targets=given.predicts_next_tokens,
        held_out=config.held_out or 0.0,
    )


def image_tokens(stack: LayerStack, inputs: Inputs) -> int:
    """Number of tokens that a model makes of each image of a batch."""
    one = inputs.part(slice(1)).to(input_device(stack.model))
    return stack.enter(one)[0].shape[1]


@torch.no_grad()
def run_whole(given: Given, inputs: Inputs) -> None:
    """Runs the user's `predict` on a batch."""
    given.predict(given.whole, Entries(inputs.to(input_device(given.model))))


def warn_if_few(tokens: int, targets: Sequence[SubLayer]) -> None:
    """Warns where weights are fitted to fewer tokens than an output projection has inputs."""
    widest = max(targets, key=lambda target: target.width)
    if tokens < widest.width:
        warnings.warn(
            f"The calibration data have {tokens:,} tokens, fewer than the {widest.width:,} inputs of "
            f"{widest.name}, whose weights are fitted to them. The result will do well on these data "
            f"and badly on others. Pass at least {10 * widest.width:,} tokens.",
            UserWarning,
            stacklevel=4,
        )


def _own_collate(whole: Any) -> Callable[[list[Example]], Mapping[str, Any]] | None:
    """The way in which a model of sentence-transformers makes inputs of texts."""
    if not is_from(whole, "sentence_transformers"):
        return None
    make = getattr(whole, "preprocess", None) or getattr(whole, "tokenize", None)
    if make is None and getattr(whole, "tokenizer", None) is not None:  # a CrossEncoder before 6
        make = partial(whole.tokenizer, padding=True, truncation=True, return_tensors="pt")
    if make is None:
        return None
    prompts, name = getattr(whole, "prompts", None), getattr(whole, "default_prompt_name", None)
    prompt = prompts.get(name) if prompts and name else None

    def collate(examples: list[Example]) -> dict[str, Tensor]:
        inputs: list[Any] = []
        for each in examples:
            if not isinstance(each, Text | Pair):
                raise TypeError(
                    f"A {type(whole).__name__} is calibrated on texts or pairs of texts, but the data "
                    f"have a {type(each).__name__.lower()}. Pass a list of texts."
                )
            inputs.append(each.text if isinstance(each, Text) else (each.first, each.second))
        if hasattr(whole, "preprocess"):
            features = make(inputs, prompt=prompt)
        else:
            features = make([(prompt or "") + i if isinstance(i, str) else i for i in inputs])
        return {name: value for name, value in features.items() if isinstance(value, Tensor)}

    return collate
