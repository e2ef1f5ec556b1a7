"""What a user may choose about a pruning run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from .architectures.tasks import PROBLEM_TYPES, ProblemType
from .budget.costs import METRICS, Metric
from .common.memory import bytes_of
from .config_checks import number, one_of, option, or_none, size, switch, whole_number

Schedule = Literal["per_layer", "per_sublayer"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
LambdaScale = Literal["relative", "absolute"]
LAMBDA_SCALES: tuple[LambdaScale, ...] = get_args(LambdaScale)
Sensitivity = Literal["fisher", "gradient"]
SENSITIVITIES: tuple[Sensitivity, ...] = get_args(Sensitivity)


@dataclasses.dataclass(frozen=True)
class KPruneConfig:
    """Options of :func:`kprune_ext.kprune`; immutable, and checked when it is made.

    Raises:
        ValueError: an option lies outside its range.
        TypeError: an option has the wrong type.
    """

    reduction: float = option(
        0.5,
        number(
            "(0, 1)",
            "It is the fraction of encoder FLOPs to remove: pass 0.5 to keep half of them.",
        ),
        "Fraction of the encoder's FLOPs to remove, strictly between 0 and 1 (or of "
        "what metric says). For a model that was pruned before, a fraction of what it has now.",
    )
    metric: Metric = option(
        "flops",
        one_of(*METRICS),
        "What reduction counts: 'flops', 'params' (of heads and neurons), or 'latency' "
        "(measured on the model's device).",
    )
    temperature: float = option(
        2.0,
        number("(0, inf)"),
        "Temperature at which class probabilities are softened for the scores.",
    )
    lambda_rep: float = option(
        1.0,
        number(
            "[0, inf)",
            "Pass 0 (and prior_samples=0) to use predictive knowledge alone, or a positive weight.",
        ),
        "Weight of representational against predictive knowledge (lambda), in the unit "
        "that lambda_scale says.",
    )
    lambda_scale: LambdaScale = option(
        "relative",
        one_of(*LAMBDA_SCALES),
        "'relative': the two kinds of knowledge of all units that are still to be "
        "pruned are brought to the same sum first; 'absolute': as they are (the paper's way).",
    )
    prior_samples: float = option(
        1.0,
        number("[0, inf)", "Pass 0 to take predictive knowledge as it was measured."),
        "Predictive knowledge counts as if it had been measured on so many samples more, "
        "on which it were spread over the units as representational knowledge is; 0: as measured.",
    )
    min_share: float = option(
        0.5,
        number("[0, 1]", "Pass 0 for no lower bound on what a sub-layer keeps."),
        "Every sub-layer keeps at least this part of the units that it would keep if "
        "all sub-layers were pruned alike, whatever the scores say; 0 for no such bound.",
    )
    mu: float | None = option(
        None,
        or_none(number("(0, inf)")),
        "Weight of an attention head's mean knowledge per dimension against a "
        "neuron's knowledge (mu). None: the head size, which turns the mean into a sum.",
    )
    schedule: Schedule = option(
        "per_layer",
        one_of(*SCHEDULES),
        "How often knowledge is measured anew: 'per_layer', before the attention of "
        "each layer, or 'per_sublayer', before every sub-layer (the paper's way, twice the "
        "cost).",
    )
    score_fraction: float = option(
        0.1,
        number(
            "(0, 1]",
            "It is the part of the calibration samples on which knowledge is measured: pass 1.0 for "
            "all of them.",
        ),
        "Part of the calibration samples on which knowledge is measured, in (0, 1]. "
        "Weight tuning always uses all of them.",
    )
    min_score_samples: int = option(
        512,
        whole_number(),
        "Knowledge is measured on at least so many samples, if there are as many.",
    )
    max_score_passes: int = option(
        8,
        whole_number(),
        "Predictive knowledge takes one backward pass per class and position (one in "
        "all for two classes). Where that is more than this, so many passes with random signs "
        "estimate it, without bias.",
    )
    sensitivity: Sensitivity = option(
        "fisher",
        one_of(*SENSITIVITIES),
        "Predictive knowledge: 'fisher', the Fisher information of the predictive "
        "distribution; 'gradient', the squared gradient of the divergence from the original "
        "model (the paper's, zero at the first sub-layer).",
    )
    problem_type: ProblemType | None = option(
        None,
        one_of(None, *PROBLEM_TYPES),
        "What the logits mean: 'single_label_classification', "
        "'multi_label_classification' or 'regression'. None: what the task or the model's "
        "config says.",
    )
    ridge: float | None = option(
        None,
        or_none(number("[0, inf)", "Pass 0 for the least that works.")),
        "Strength of the pull towards the original weights in weight tuning, in units "
        "of (units / tokens) x the mean square activation. 0: what rounding needs. None: for "
        "each sub-layer what fits best where it is tried on samples that it was not fitted to.",
    )
    tune_bias: bool = option(
        True,
        switch,
        "Tune the output projections' biases, too, not their weights alone.",
    )
    scale_logits: bool = option(
        True,
        switch,
        "At the end, multiply the classifier's weight and bias by the one number that "
        "brings class probabilities nearest to the original model's. No ranking changes.",
    )
    unread_weight: float = option(
        0.1,
        number("[0, 1]", "Pass 1 to count all tokens of the last layer alike."),
        "How much a token counts in the last layer whose state there no prediction depends "
        "on, such as all but the first for most classifiers; 1: as much as those that are read.",
    )
    max_tokens: int = option(
        100_000,
        whole_number(),
        "Calibration stops before the sample that would exceed this many unmasked "
        "tokens (the first sample is always taken).",
    )
    batch_tokens: int = option(
        2048,
        whole_number(),
        "Tokens that go through the model at a time. Samples are regrouped by length, "
        "so the dataloader's own batch size does not matter.",
    )
    sequence_length: int | None = option(
        None,
        or_none(whole_number()),
        "Tokens per sequence at which FLOPs are counted. None: the mean number of "
        "unmasked tokens of the calibration samples, rounded.",
    )
    max_state_memory: int | str = option(
        "4GiB",
        size,
        "Hidden states of the calibration data beyond this, such as '500MiB' or a "
        "number of bytes, are kept in a temporary file that is mapped into memory.",
    )
    seed: int = option(
        0,
        whole_number(least=None),
        "Chooses the samples on which knowledge is measured.",
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
        """The publication's own choices (arXiv 2308.03449, section 4 and its hyperparameters).

        Temperature 2, lambda 2.5e-4, mu 64; knowledge by the gradient of the divergence, on the
        whole sample, before every sub-layer; least squares for the weights of the output
        projections without a ridge, their biases and the classifier as they were.

        Args:
            reduction: fraction of the encoder's FLOPs to remove.
            options: what is to differ.
        """
        paper: dict[str, Any] = {
            "temperature": 2.0,
            "lambda_rep": 2.5e-4,
            "lambda_scale": "absolute",
            "prior_samples": 0.0,
            "min_share": 0.0,
            "mu": 64.0,
            "sensitivity": "gradient",
            "schedule": "per_sublayer",
            "score_fraction": 1.0,
            "ridge": 0.0,
            "tune_bias": False,
            "scale_logits": False,
            "unread_weight": 1.0,
        }
        return cls(reduction=reduction, **(paper | options))

    def to_dict(self) -> dict[str, Any]:
        """Every option by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> KPruneConfig:
        """The configuration with these options; the others keep their defaults.

        Raises:
            ValueError: an option is unknown or out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(
                f"Unknown option {', '.join(unknown)}. KPruneConfig has: {', '.join(known)}."
            )
        return cls(**options)
