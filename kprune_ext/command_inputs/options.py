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
    "causal-lm",
    "embeddings",
    "image-classification",
]
# Present names of options by earlier name, and names that other programs use.
ALIASES = Aliases(
    {"out": "output"},
    meant={
        "sparsity": ("reduction", "reductions"),
        "ratio": ("reduction", "reductions"),
        "amount": ("reduction", "reductions"),
        "dataset": ("data", "data_name"),
        "metric_for_best_model": ("eval",),
        "eval_metric": ("eval",),
        "eval_dataset": ("eval_data",),
        "validation_file": ("eval_data",),
        "test_file": ("eval_data",),
        "samples": ("max_tokens",),
        "num_samples": ("max_tokens",),
        "model_name_or_path": ("model",),
        "output_dir": ("output",),
        "length": ("max_length",),
        "torch_dtype": ("dtype",),
    },
)


@dataclass(frozen=True)
class CalibratedOptions:
    """What every command that prunes is told: the model, the data, what counts, and how to prune.

    Args:
        model: Hub id or local path of the model.
        data: Calibration data, which need no labels. This is a .txt, .json, .jsonl, .csv, .tsv or
            .parquet file, or the id of a data set on the hub.
        output: Folder to write the pruned model, its tokenizer and its report to. It must be new or
            empty.
        metric: Quantity that reduction refers to. By default it is flops for encoders, params (the
            parameters of heads and neurons) for decoders.
        layout: Sizes of the layers. The value uniform keeps the same numbers in every layer, which
            transformers and others load without this package.
        round_to: Number of which every feed-forward network keeps a multiple of neurons.
        task: Task of the model. The value auto reads it from the model's config.
        text_field: Field with the text, or two fields for pairs such as question and context. For
            causal language models two fields are a prompt and its answer.
        image_field: Field with the images.
        data_name: Configuration of the data set on the hub.
        split: Split of the data set on the hub.
        max_length: Largest number of tokens per sequence. By default it is 128, and 512 for causal
            language models, whose texts are packed into sequences of this length.
        batch_size: Number of sequences per batch. It does not affect the result.
        max_tokens: Largest number of calibration tokens.
        lambda_rep: Weight of representational relative to predictive knowledge. By default it is 1, for
            question answering 0.1.
        schedule: How often knowledge is measured: once, per layer or per sub-layer. By default it is per
            layer for encoders, once for decoders.
        score_fraction: Fraction of the calibration samples on which knowledge is measured.
        ridge: Ridge towards the original weights in weight tuning. By default it is chosen by held-out
            error.
        min_share: Least part that a sub-layer keeps of what it would keep if all were pruned alike.
        min_head_share: The same for attention, where it is to differ.
        sequence_length: Tokens per sequence at which FLOPs are counted. By default it is the
            mean length of the calibration data.
        seed: Seed of the order in which rows are taken, and of the choice of samples to score.
        paper: Use the paper's options in place of the defaults. Of the other options here, only
            reduction, metric, layout, round_to, max_tokens, sequence_length and seed are used then.
        latency: Latency table (JSON) to use with the metric latency. If the file does not exist, the
            latency is measured and written to it.
        device: Device to prune on, such as cpu or cuda:1. By default it is a GPU if one is available.
        device_map: Device map by which transformers places the model on several devices. The value auto
            uses all GPUs, and CPU memory if they are too small. It cannot be combined with device.
        dtype: Dtype to load the weights in. The value auto keeps the dtype in which they are stored.
        revision: Branch, tag or commit of the model on the hub.
        self_contained: Write a modelling file as well, with which transformers loads the pruned model
            without this package, given trust_remote_code=True.
    """

    model: str
    data: str
    output: str
    metric: Literal["flops", "params", "latency", "cache"] | None = None
    layout: Literal["free", "uniform"] = "free"
    round_to: int = 1
    task: Task = "auto"
    text_field: list[str] | str = "text"
    image_field: str = "image"
    data_name: str | None = None
    split: str = "train"
    max_length: int | None = None
    batch_size: int = 32
    max_tokens: int = 100_000
    lambda_rep: float | None = None
    schedule: Literal["per_layer", "per_sublayer", "once"] | None = None
    score_fraction: float | None = None
    ridge: float | None = None
    min_share: float | None = None
    min_head_share: float | None = None
    sequence_length: int | None = None
    seed: int = 0
    paper: bool = False
    latency: str | None = None
    device: str | None = None
    device_map: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    self_contained: bool = False


@dataclass(frozen=True)
class PruneOptions(CalibratedOptions):
    """Prune heads and neurons of a model and tune the remaining weights, without training.

    Args:
        reduction: Fraction to remove of the quantity that metric names.
        covariances: File to write the covariances of the pruned layers' inputs to. From it
            peft-corda calibrate or init starts an adapter without a pass over the data.
        plot: File to write a figure of the kept units to. It requires matplotlib.
    """

    reduction: float = 0.5
    covariances: str | None = None
    plot: str | None = None


@dataclass(frozen=True)
class PlanOptions:
    """Say what pruning a decoder will take in memory and computation, from its config alone.

    Args:
        model: Hub id or local path of the model, of which only the config is read.
        reduction: Fraction to remove of the quantity that metric names.
        metric: Quantity that reduction refers to.
        layout: Sizes of the layers, as for prune.
        schedule: How often knowledge is measured, as for prune.
        max_tokens: Number of calibration tokens.
        max_length: Number of tokens per calibration sequence.
        dtype: Dtype of the weights. The value auto is the one that the config names.
        device: Device that the model will be pruned on. By default it is a GPU if one is available.
        revision: Branch, tag or commit of the model on the hub.
        json: File to write the plan to, as JSON.
    """

    model: str
    reduction: float = 0.5
    metric: Literal["flops", "params", "latency", "cache"] | None = None
    layout: Literal["free", "uniform"] = "free"
    schedule: Literal["per_layer", "per_sublayer", "once"] | None = None
    max_tokens: int = 100_000
    max_length: int = 512
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    revision: str | None = None
    json: str | None = None


@dataclass(frozen=True)
class ExportOptions:
    """Write a pruned decoder for another engine: a GGUF file for llama.cpp, a DeciLM folder for vLLM.

    Args:
        model: Folder or hub id of the model, pruned or not.
        output: GGUF file to write, or the folder to write, which must be new or empty.
        format: Format to write. The value gguf stands for a GGUF file, deci for a DeciLMForCausalLM
            checkpoint with block_configs.
        dtype: Dtype of the matrices. The value auto keeps that of the embedding.
        tokenizer: Folder or hub id of the tokenizer. By default it is that of the model.
        pre_tokenizer: Name of llama.cpp for the way in which the tokenizer splits text, if it is not
            recognised.
        pad: Fill layers up with zeros to one size, where the engine does not read a size per layer.
        overwrite: Replace a GGUF file that exists.
    """

    model: str
    output: str
    format: Literal["gguf", "deci"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tokenizer: str | None = None
    pre_tokenizer: str | None = None
    pad: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class ReportOptions:
    """Print the units that a pruning run kept, layer by layer.

    Args:
        source: Folder of a pruned model that `kprune prune` wrote, or a report file.
        format: How the report is printed: as a table, as Markdown or as JSON.
        json: File to write the report to, as JSON.
        plot: File to write a figure of the kept units to. It requires matplotlib.
    """

    source: str
    format: Literal["table", "md", "json"] = "table"
    json: str | None = None
    plot: str | None = None
