"""Options of the command `kprune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.command_line import Aliases

Task = Literal[
    "auto",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
    "embeddings",
    "image-classification",
]
# Earlier names of options.
ALIASES = Aliases({"out": "output"})
# Options that take no value on the command line.
FLAGS = {"paper": "Use the publication's options in place of the defaults."}


@dataclass(frozen=True)
class PruneOptions:
    """Remove heads and neurons from an encoder and tune what stays, with data and no training.

    Args:
        model: Hub id or local path of the model.
        data: Data to calibrate on, labels not needed: a .txt, .json, .jsonl, .csv, .tsv or .parquet
            file, or the id of a data set on the hub.
        output: Folder to write the pruned model, its tokenizer and its report to; must be new or empty.
        reduction: Fraction to remove of what metric says.
        metric: What reduction counts.
        task: What the model is for; auto reads it from the model's config.
        text_field: Fields with the text, one, or two for pairs such as question and context.
        image_field: Field with the images.
        data_name: Configuration of the data set on the hub.
        split: Of the data set on the hub.
        max_length: Tokens per sequence at most.
        batch_size: Sequences per batch; no matter for the result.
        max_tokens: Calibration tokens.
        lambda_rep: Weight of representational against predictive knowledge.
        schedule: How often knowledge is measured anew.
        score_fraction: Part of the sample on which knowledge is measured.
        ridge: Pull towards the original weights in weight tuning; by default chosen by held-out error.
        sequence_length: Tokens per sequence at which FLOPs are counted; by default the data's mean.
        seed: Of the order of the rows, and of what is scored.
        paper: Use the publication's options in place of the defaults; those given here count for
            nothing, except reduction, metric, max_tokens, sequence_length and seed.
        latency: Latency table (JSON) to use, or to write if there is none; for metric latency.
        device: Where to prune, such as cpu or cuda:1; by default a GPU if there is one.
        device_map: How transformers places the model on several devices, such as auto: on all GPUs, and
            in CPU memory if they do not hold it. Not with device.
        dtype: To load the weights in; auto is how they are stored.
        revision: Branch, tag or commit of the model on the hub.
        plot: Picture of what was kept to write; needs matplotlib.
    """

    model: str
    data: str
    output: str
    reduction: float = 0.5
    metric: Literal["flops", "params", "latency"] = "flops"
    task: Task = "auto"
    text_field: list[str] | str = "text"
    image_field: str = "image"
    data_name: str | None = None
    split: str = "train"
    max_length: int = 128
    batch_size: int = 32
    max_tokens: int = 100_000
    lambda_rep: float | None = None
    schedule: Literal["per_layer", "per_sublayer"] | None = None
    score_fraction: float | None = None
    ridge: float | None = None
    sequence_length: int | None = None
    seed: int = 0
    paper: bool = False
    latency: str | None = None
    device: str | None = None
    device_map: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    revision: str | None = None
    plot: str | None = None


@dataclass(frozen=True)
class ReportOptions:
    """Print what a pruning run kept, layer by layer.

    Args:
        source: Folder of a pruned model that `kprune prune` wrote, or a report file.
        json: File to write the report to.
        plot: Picture of what was kept to write; needs matplotlib.
    """

    source: str
    json: str | None = None
    plot: str | None = None
