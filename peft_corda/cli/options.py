"""Options of the command `peft-corda`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kprune_ext.common.command_line import Aliases

Task = Literal[
    "causal-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "embeddings",
]
ALIASES = Aliases()
# Options that take no value on the command line.
FLAGS = {
    "trust_remote_code": "Run code that comes with the model. Only for a source that you trust.",
    "pack": "Put the texts one after the other and cut them into sequences of max_length tokens.",
    "use_rslora": "Scale by the square root of the rank.",
}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What calibrate and init have in common: a model, data, and which layers are adapted.

    Args:
        model: Hub id or local path of the base model.
        task: What the model is for, which decides the Auto class that loads it. PEFT's names, such as
            CAUSAL_LM, are understood, too.
        revision: Branch, tag or commit of the model on the hub.
        gguf_file: Name of the GGUF file in the model's folder, to load that.
        dtype: To load the weights in; "auto" is how they are stored.
        device: Where to put the model, such as cpu or cuda:1; by default a GPU if there is one.
        device_map: How transformers spreads the model over devices, such as auto; not with device.
        trust_remote_code: Run code that comes with the model. Only for a source that you trust.
        data_name: Configuration of the data set on the hub.
        split: Of the data set on the hub.
        text_field: Field with the text; several fields are joined by line breaks.
        target_field: Field with the decoder's text, for encoder-decoder models only.
        num_samples: Sequences to calibrate on.
        max_length: Tokens per sequence at most.
        batch_size: Sequences per batch.
        pack: Put the texts one behind the other and cut them into sequences of max_length tokens. By
            default each row is a sequence, cut off or padded.
        seed: Of the choice of rows; null takes the first ones.
        r: Rank of the adapters; for calibrate the largest that the factors are enough for.
        target_modules: Names of linear layers, as in a LoraConfig.
        exclude_modules: Names of modules to leave out.
        rank_pattern: Ranks for some modules in place of r, by name.
        corda_damping: Multiple of the mean input energy that is added to the covariance's diagonal.
        corda_weighting: What the weight is multiplied by before it is decomposed.
        max_memory: What the statistics may take at a time, such as 4GiB; more passes if need be.
        checkpoint_dir: Folder that an interrupted calibration goes on from.
    """

    model: str
    task: Task = "causal-lm"
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False
    data_name: str | None = None
    split: str = "train"
    text_field: list[str] | str = "text"
    target_field: list[str] | str | None = None
    num_samples: int = 256
    max_length: int = 512
    batch_size: int = 8
    pack: bool = False
    seed: int | None = 0
    r: int = 16
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    corda_damping: float = 0.01
    corda_weighting: Literal["covariance", "sqrt_covariance"] = "covariance"
    max_memory: int | str | None = None
    checkpoint_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(ModelOptions):
    """Run calibration data through a model and write the factors that CorDA adapters start from.

    Args:
        data: Text to calibrate on: a .txt, .md, .json, .jsonl, .csv, .tsv or .parquet file, or the id
            of a data set on the hub. For kpm, what the model should keep; for ipm, the task.
        output: Factors file to write, such as factors.safetensors.
        corda_method: "kpm" for directions that the data uses least, "ipm" for those that it uses most.
        report: JSON file to write the report to.
    """

    data: str
    output: str
    corda_method: Literal["kpm", "ipm", "both"] = "kpm"
    report: str | None = None


@dataclass(frozen=True, kw_only=True)
class InitOptions(ModelOptions):
    """Write an untrained adapter, for any trainer that loads adapters to go on from.

    Args:
        output: Folder to write; load it with PeftModel.from_pretrained(model, folder,
            is_trainable=True).
        factors: File written by calibrate. The options of the calibration are then without effect.
        data: Text to calibrate on, as for calibrate; in place of factors.
        lora_alpha: Scaling times r; by default r, the paper's setting.
        alpha_pattern: Values for some modules in place of lora_alpha, by name.
        use_rslora: Scale by the square root of the rank.
        lora_dropout: On the inputs of the trained factors.
        bias: Which biases are trained.
        modules_to_save: Names of modules that are trained whole.
        corda_method: "kpm" for directions that the data uses least, "ipm" for those that it uses most.
        corda_scaling: How the start is spread over A and B.
    """

    output: str
    factors: str | None = None
    data: str | None = None
    lora_alpha: int | None = None
    alpha_pattern: dict[str, int] | None = None
    use_rslora: bool = False
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    corda_method: Literal["kpm", "ipm"] = "kpm"
    corda_scaling: Literal["balanced", "paper"] = "balanced"


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained CorDA adapter as a plain LoRA adapter, which loads without this package.

    Args:
        src: Folder with the saved adapter.
        dst: Folder to write.
        rank: Of the LoRA adapter; by default twice that of the adapter, which is exact. With a smaller
            one its update is the best approximation.
        dtype: Of the LoRA adapter; by default that of the adapter.
    """

    src: str
    dst: str
    rank: int | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None


@dataclass(frozen=True)
class ReportOptions:
    """Print what a factors file holds, and how a budget of parameters is best spent.

    Args:
        factors: File written by calibrate.
        method: "kpm" or "ipm"; needed if the file holds both.
        r: Rank of the adapters; by default the largest that the file is enough for.
        corda_scaling: How the start is spread over A and B.
        json: File to write the report to.
        plot: Picture of the spectra to write; needs matplotlib.
        budget: Print a rank_pattern of at most so many trainable parameters.
        mean_rank: Print a rank_pattern of at most what this uniform rank takes.
        min_rank: Least rank in the rank_pattern.
    """

    factors: str
    method: Literal["kpm", "ipm"] | None = None
    r: int | None = None
    corda_scaling: Literal["balanced", "paper"] = "balanced"
    json: str | None = None
    plot: str | None = None
    budget: int | None = None
    mean_rank: float | None = None
    min_rank: int = 1


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Print what a calibration takes: bytes per device, passes, FLOPs. Needs no weights.

    Args:
        model: Hub id of the model, or folder or file with its config.
        task: What the model is for.
        dtype: Of the weights; "auto" is what the config says.
        r: Rank of the adapters.
        target_modules: Names of linear layers, as in a LoraConfig.
        exclude_modules: Names of modules to leave out.
        corda_method: What to find directions for.
        num_samples: Sequences to calibrate on, all devices together.
        max_length: Tokens per sequence.
        batch_size: Sequences per batch.
        max_memory: What the statistics may take at a time, such as 4GiB.
        gpus: Devices, each with a process and its share of the data.
        json: File to write the figures to.
    """

    model: str
    task: Task = "causal-lm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    r: int = 16
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    corda_method: Literal["kpm", "ipm", "both"] = "kpm"
    num_samples: int = 256
    max_length: int = 512
    batch_size: int = 8
    max_memory: int | str | None = None
    gpus: int = 1
    json: str | None = None
