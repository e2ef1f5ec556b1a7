"""Options of a pruning run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ..architectures.tasks import PROBLEM_TYPES, ProblemType
from ..budget.costs import METRICS, Metric
from ..common.memory import bytes_of
from .config_checks import (
    CPU_BATCH_TOKENS,
    PAPER,
    documented,
    left_open,
    number,
    one_of,
    option,
    or_none,
    size,
    switch,
    whole_number,
)

Schedule = Literal["per_layer", "per_sublayer", "once"]
LambdaScale = Literal["relative", "absolute"]
Sensitivity = Literal["fisher", "gradient"]
Layout = Literal["free", "uniform"]


@documented
@dataclasses.dataclass(frozen=True)
class KPruneConfig:
    """Options of `kprune_ext.kprune`; immutable, and checked on construction.

    Raises:
        ValueError: If an option lies outside its range.
        TypeError: If an option has the wrong type.
    """

    reduction: float = option(
        0.5,
        number(
            "(0, 1)",
            "It is the fraction of the layers' FLOPs or parameters to remove: pass 0.5 to keep half.",
        ),
        "Fraction of the quantity that metric names to remove, strictly between 0 and 1. For a model "
        "that was pruned before, it is a fraction of the present size.",
    )
    metric: Metric | None = option(
        None,
        one_of(None, *METRICS),
        "Quantity that reduction refers to: 'flops', 'params' (parameters of heads and neurons), "
        "'latency' (measured on the model's device), or 'cache' (bytes of a decoder's key-value cache "
        "per token; all neurons stay). None stands for FLOPs in encoders, parameters in decoders.",
    )
    layout: Layout = option(
        "free",
        one_of(*get_args(Layout)),
        "Sizes of the layers: 'free' lets each keep as much as its units are worth, 'uniform' keeps "
        "the same number of heads and of neurons in every layer, those of the most knowledge. Its "
        "result is a model of transformers' own class, which loads without this package.",
    )
    round_to: int = option(
        1,
        whole_number(),
        "Number of which every MLP keeps a multiple of neurons, such as 64 for a GPU's kernels.",
    )
    temperature: float | None = option(
        None,
        or_none(number("(0, inf)")),
        "Temperature that softens the class probabilities from which scores are computed. None stands "
        "for 2, and for 1 for language models.",
    )
    lambda_rep: float | None = option(
        None,
        or_none(
            number("[0, inf)", "Pass 0 (and prior_samples=0) to use predictive knowledge alone.")
        ),
        "Weight of representational relative to predictive knowledge (lambda), on the scale that "
        "lambda_scale names. None stands for 1, for question answering by spans for 0.1.",
    )
    lambda_scale: LambdaScale = option(
        "relative",
        one_of(*get_args(LambdaScale)),
        "Scale of lambda_rep. 'relative' first scales both kinds of knowledge to the same sum over "
        "all units that are still to be pruned. 'absolute' takes them as measured (as in the paper).",
    )
    prior_samples: float = option(
        1.0,
        number("[0, inf)", "Pass 0 to use predictive knowledge as measured."),
        "Number of pseudo-samples added to predictive knowledge, on which it is distributed over the "
        "units as representational knowledge is. 0 uses predictive knowledge as measured.",
    )
    min_share: float = option(
        0.5,
        number("[0, 1]", "Pass 0 to set no lower bound on the units of a sub-layer."),
        "Every sub-layer keeps at least this fraction of the units that it would keep if all "
        "sub-layers were pruned alike, whatever the scores are; in decoders at least one, if the budget "
        "allows it for all. 0 sets no lower bound.",
    )
    min_head_share: float | None = option(
        None,
        or_none(number("[0, 1]", "Pass 0 to set no lower bound on heads.")),
        "min_share of attention, where it is to differ from that of feed-forward networks.",
    )
    balance: float = option(
        0.0,
        number("[0, 1]", "Pass 0 to take the scores as they are."),
        "How far the scores of each kind of sub-layer are scaled to one mean in all layers: 0 leaves "
        "them as they are, 1 prunes all layers about alike.",
    )
    mu: float | None = option(
        None,
        or_none(number("(0, inf)")),
        "Weight of an attention head's mean knowledge per dimension relative to a neuron's "
        "knowledge (mu). None stands for the head size, which turns the mean into a sum.",
    )
    relative_knowledge: bool | None = option(
        None,
        or_none(switch),
        "Whether each token's representational knowledge is divided by the mean square of its hidden "
        "state after the sub-layer, which grows through the layers where norms come before sub-layers. "
        "None stands for True in decoders only.",
    )
    schedule: Schedule | None = option(
        None,
        one_of(None, *get_args(Schedule)),
        "How often knowledge is measured: 'once' measures it at the start, 'per_layer' before the "
        "attention of each layer, 'per_sublayer' before every sub-layer (as in the paper, at twice the "
        "cost). None stands for 'per_layer' in encoders, 'once' in decoders.",
    )
    score_fraction: float | None = option(
        None,
        or_none(
            number(
                "(0, 1]",
                "It is the fraction of the calibration samples on which knowledge is measured: pass "
                "1.0 to use all of them.",
            )
        ),
        "Fraction of the calibration samples on which knowledge is measured, in (0, 1]. Weight tuning "
        "always uses all of them. None stands for 0.1 in encoders, 0.5 in decoders.",
    )
    min_score_samples: int | None = option(
        None,
        or_none(whole_number()),
        "Least number of samples on which knowledge is measured; all samples if there are fewer. None "
        "stands for 512 in encoders, 64 in decoders.",
    )
    max_score_passes: int | None = option(
        None,
        or_none(whole_number()),
        "Largest number of backward passes per sample for predictive knowledge. The exact value takes "
        "one per class and position (a single one for two classes); where that is more than this "
        "number, likely classes have passes of their own and all others share the rest with random "
        "signs, which is right in the mean. Language models take this number, each with next tokens of "
        "its own. None stands for 8, for question answering by spans 3, for language models 1.",
    )
    sensitivity: Sensitivity = option(
        "fisher",
        one_of(*get_args(Sensitivity)),
        "Measure of predictive knowledge: 'fisher' is the Fisher information of the predictive "
        "distribution; 'gradient' is the squared gradient of the divergence from the original "
        "model (as in the paper; zero at the first sub-layer).",
    )
    problem_type: ProblemType | None = option(
        None,
        one_of(None, *PROBLEM_TYPES),
        "Meaning of the logits: 'single_label_classification', 'multi_label_classification' or "
        "'regression'. None takes it from the task or the model's config.",
    )
    ridge: float | None = option(
        None,
        or_none(number("[0, inf)", "Pass 0 for the smallest ridge that is stable.")),
        "Ridge towards the original weights in weight tuning, in multiples of (units / tokens) x the "
        "mean square activation. 0 adds only what rounding requires. None chooses, for each "
        "sub-layer, the ridge with the least error on held-out samples.",
    )
    tune_bias: bool = option(
        True,
        switch,
        "Whether to tune the biases of the output projections as well as their weights.",
    )
    scale_logits: bool = option(
        True,
        switch,
        "Whether to multiply the classifier's weight and bias, at the end, by the one factor that "
        "brings class probabilities closest to the original model's. No ranking changes.",
    )
    unread_weight: float = option(
        0.1,
        number("[0, 1]", "Pass 1 to weight all tokens of the last layer equally."),
        "Weight in the last layer of tokens on whose hidden state no prediction depends, such as all "
        "but the first token for most classifiers. 1 weights them like the tokens that are read.",
    )
    max_tokens: int = option(
        100_000,
        whole_number(),
        "Largest number of unmasked calibration tokens: calibration stops before the sample that "
        "would exceed it (the first sample is always taken).",
    )
    batch_tokens: int | None = option(
        None,
        or_none(whole_number()),
        "Tokens per batch of a forward pass. Samples are regrouped by length, so the batch size of "
        "the dataloader does not matter. None stands for 2048 on a CPU, and for up to 16384 on a GPU, "
        "as far as its memory allows.",
    )
    held_out: float | None = option(
        None,
        or_none(number("[0, 0.5]", "Pass 0 to hold out none.")),
        "Fraction of the samples that are set aside for the report: perplexity, agreement with the "
        "original and accuracy are measured on them. None stands for 0.05 for language models "
        "and for 0 for others, which are then judged on the calibration data.",
    )
    measure_speed: bool = option(
        True,
        switch,
        "Whether to time a forward pass of both models for the report, which takes about a second.",
    )
    sequence_length: int | None = option(
        None,
        or_none(whole_number()),
        "Tokens per sequence at which FLOPs are counted. None takes the mean number of unmasked "
        "tokens of the calibration samples, rounded.",
    )
    max_state_memory: int | str = option(
        "4GiB",
        size,
        "Memory for the hidden states of the calibration data, such as '500MiB' or a number of "
        "bytes. Hidden states beyond it are kept in a memory-mapped temporary file.",
    )
    seed: int = option(
        0, whole_number(least=None), "Seed of the choice of samples that knowledge is measured on."
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            field.metadata["check"](field.name, getattr(self, field.name))

    @property
    def state_bytes(self) -> int:
        """`max_state_memory` in bytes."""
        return bytes_of("max_state_memory", self.max_state_memory)

    @classmethod
    def paper(cls, reduction: float = 0.5, **options: Any) -> KPruneConfig:
        """Returns the configuration of the paper (arXiv 2308.03449, section 4 and hyperparameters).

        Temperature is 2, lambda 2.5e-4 and mu 64. Knowledge is the gradient of the divergence, measured
        on all samples before every sub-layer. The weights of the output projections are fitted by
        least squares without a ridge; their biases and the classifier stay as they were.

        Args:
            reduction: Fraction of the encoder's FLOPs to remove.
            options: Options that differ from the paper's.
        """
        return cls(reduction=reduction, **(PAPER | options))

    def meant_for(
        self,
        *,
        is_causal: bool,
        next_tokens: bool,
        spans: bool = False,
        batch_tokens: int = CPU_BATCH_TOKENS,
    ) -> KPruneConfig:
        """Returns the configuration with None replaced by what it stands for.

        Args:
            is_causal: Whether the model is a decoder.
            next_tokens: Whether its task is causal language modelling.
            spans: Whether its predictions are spans of the text.
            batch_tokens: Tokens per batch on the model's device.
        """
        pairs = left_open(is_causal, next_tokens, spans) | {"batch_tokens": batch_tokens}
        missing = {n: value for n, value in pairs.items() if getattr(self, n) is None}
        return dataclasses.replace(self, **missing)

    def to_dict(self) -> dict[str, Any]:
        """Returns every option by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> KPruneConfig:
        """Returns the configuration with these options; the others keep their defaults.

        Raises:
            ValueError: If an option is unknown or out of range.
            TypeError: If an option has the wrong type.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(
                f"Unknown option {', '.join(unknown)}. KPruneConfig has: {', '.join(known)}."
            )
        return cls(**options)
