"""Options of the command `peft-corda`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kprune_ext.common.command_line import Aliases
from kprune_ext.console.options import Command

Task = Literal[
    "causal-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "embeddings",
]
# Names that other programs use.
ALIASES = Aliases(
    meant={
        "rank": ("r",),
        "lora_r": ("r",),
        "alpha": ("lora_alpha",),
        "dropout": ("lora_dropout",),
        "dataset": ("data", "data_name"),
        "samples": ("num_samples",),
        "model_name_or_path": ("model",),
        "output_dir": ("output",),
        "length": ("max_length",),
        "torch_dtype": ("dtype",),
        "resume": ("checkpoint_dir",),
        "method": ("corda_method",),
    }
)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options that calibrate and init share: the model, the data and the layers to adapt.

    Args:
        model: Hub id or local path of the base model.
        task: Task of the model, which determines the Auto class that loads it. PEFT's names, such as
            CAUSAL_LM, are also accepted.
        revision: Branch, tag or commit of the model on the Hub.
        gguf_file: Name of the GGUF file to load from the model's folder.
        dtype: Data type to load the weights in; "auto" is the one they are stored in.
        device: Device to put the model on, such as cpu or cuda:1; by default a GPU if one is present.
        device_map: Device map by which transformers places the model on several devices, such as auto.
            It cannot be combined with device.
        trust_remote_code: Run code that comes with the model. Use it only if you trust the source.
        data_name: Configuration of the dataset on the Hub.
        split: Split of the dataset on the Hub.
        text_field: Field with the text; several fields are joined by line breaks.
        target_field: Field with the decoder's text, for encoder-decoder models only.
        num_samples: Number of sequences to calibrate on.
        max_length: Maximum number of tokens per sequence.
        batch_size: Number of sequences per batch.
        pack: Concatenate the texts and cut them into sequences of max_length tokens. By default each
            row is a sequence, truncated or padded.
        seed: Seed of the order in which rows are taken; with null, the first rows are taken in order.
        target_modules: Names of the linear layers to adapt, as in a LoraConfig: one or several names,
            a pattern (a regular expression of the full name), or all-linear.
        exclude_modules: Names of modules to leave out.
        rank_pattern: Ranks of some modules, by name, in place of r.
        corda_damping: Multiple of the mean input energy that is added to the covariance's diagonal.
        data: Text to calibrate on: a .txt, .md, .json, .jsonl, .csv, .tsv or .parquet file, or the id
            of a dataset on the Hub. Give text with the knowledge to keep for kpm, and text of the
            task for ipm. It is required, unless something else is given in its place.
        covariances: In place of data, file of the covariances of this model's layers, which
            kprune prune --covariances wrote when it pruned the model.
        keep: With sc_lora, text of the knowledge to keep, of the same kind as data, which is then that
            of the task.
        corda_beta: With sc_lora, the weight of the text to keep, between 0 and 1.
        max_memory: Memory limit of the statistics at a time, such as 4GiB. If they need more, the
            calibration takes more passes over the data. By default it is half of the memory that is
            free; with checkpoint_dir, or in several processes, an eighth of the size of the model.
        checkpoint_dir: Folder with checkpoints, from which an interrupted calibration is resumed.
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
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    corda_damping: float = 0.01
    data: str | None = None
    covariances: str | None = None
    keep: str | None = None
    corda_beta: float = 0.5
    max_memory: int | str | None = None
    checkpoint_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(ModelOptions):
    """Run calibration data through a model and write the factors that CorDA adapters start from.

    Args:
        output: Factors file to write, such as factors.safetensors.
        r: Largest rank of an adapter that the factors support.
        corda_method: Directions to find: "kpm" for those that the data uses least, "ipm" for those
            that it uses most, "both", "sc_lora" for those that the task uses and the text to keep does
            not, or "lora_null" for the inputs that the data reaches least.
        corda_weighting: Matrix that the weight is multiplied by before it is decomposed.
        report: JSON file to write the report to.
    """

    output: str
    r: int = 16
    corda_method: Literal["kpm", "ipm", "both", "sc_lora", "lora_null"] = "kpm"
    corda_weighting: Literal["covariance", "sqrt_covariance"] = "covariance"
    report: str | None = None


@dataclass(frozen=True, kw_only=True)
class InitOptions(ModelOptions):
    """Write an untrained adapter, from which any trainer that loads adapters can continue.

    Args:
        output: Folder to write the adapter to; load it with PeftModel.from_pretrained(model, folder,
            is_trainable=True).
        factors: Factors file written by calibrate, in place of data. The calibration options then have
            no effect.
        r: Rank of the adapters; by default the largest that the factors file supports, and 16 without
            such a file.
        lora_alpha: Numerator of the scaling lora_alpha / r; by default r, the paper's setting.
        alpha_pattern: Values of lora_alpha for some modules, by name.
        use_rslora: Divide lora_alpha by the square root of the rank (rsLoRA), not by the rank.
        lora_dropout: Dropout probability of the inputs of the trained factors.
        bias: Biases to train.
        modules_to_save: Names of modules that are trained in full, without an adapter.
        corda_method: Directions to start from: "kpm" for those that the data uses least, "ipm" for
            those that it uses most, "sc_lora" for those that the task uses and the text to keep does
            not, "lora_null" for the inputs that the data reaches least. By default those of the factors
            file, or "kpm" if it holds both or there is none.
        corda_weighting: Matrix that the weight is multiplied by before it is decomposed; by default
            that of the factors file, or the covariance.
        corda_scaling: Division of the start between A and B: "balanced" gives both the same singular
            values, "paper" is the paper's division.
    """

    output: str
    factors: str | None = None
    r: int | None = None
    lora_alpha: int | None = None
    alpha_pattern: dict[str, int] | None = None
    use_rslora: bool = False
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    corda_method: Literal["kpm", "ipm", "sc_lora", "lora_null"] | None = None
    corda_weighting: Literal["covariance", "sqrt_covariance"] | None = None
    corda_scaling: Literal["balanced", "paper"] = "balanced"


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained CorDA adapter as a plain LoRA adapter, which loads without this package.

    Args:
        src: Folder with the saved adapter.
        dst: Folder to write the LoRA adapter to.
        rank: Rank of the LoRA adapter; by default twice that of the CorDA adapter, which is exact. At a
            smaller rank, its update is the best approximation.
        dtype: Data type of the LoRA adapter; by default that of the CorDA adapter.
    """

    src: str
    dst: str
    rank: int | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None


@dataclass(frozen=True)
class ReportOptions:
    """Print a report on a factors file, and the best ranks within a budget of parameters.

    Args:
        factors: Factors file written by calibrate.
        method: Method to report on, such as "kpm"; needed if the file holds two.
        r: Rank of the adapters; by default the largest rank that the file supports.
        corda_scaling: Division of the start between A and B: "balanced" gives both the same singular
            values, "paper" is the paper's division.
        format: How the report is printed: as a table, as Markdown or as JSON.
        json: JSON file to write the report to.
        plot: Image file to plot the spectra to; needs matplotlib.
        budget: Maximum number of trainable parameters, within which a rank_pattern is printed.
        mean_rank: Uniform rank whose number of trainable parameters is the budget, in place of budget.
        min_rank: Minimum rank in the rank_pattern.
    """

    factors: str
    method: Literal["kpm", "ipm", "sc_lora", "lora_null"] | None = None
    r: int | None = None
    corda_scaling: Literal["balanced", "paper"] = "balanced"
    format: Literal["table", "md", "json"] = "table"
    json: str | None = None
    plot: str | None = None
    budget: int | None = None
    mean_rank: float | None = None
    min_rank: int = 1


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Print the cost of a calibration: bytes per device, passes, FLOPs. Needs no weights.

    Args:
        model: Hub id of the model, or folder or file with its config.
        task: Task of the model, which determines its Auto class.
        dtype: Data type of the weights; "auto" is the one in the config.
        r: Rank of the adapters.
        target_modules: Names of the linear layers to adapt, as in a LoraConfig.
        exclude_modules: Names of modules to leave out.
        corda_method: Directions to find: "kpm", "ipm" or "both".
        num_samples: Number of sequences to calibrate on, over all devices.
        max_length: Number of tokens per sequence.
        batch_size: Number of sequences per batch.
        max_memory: Memory limit of the statistics at a time, such as 4GiB.
        gpus: Number of devices, each with a process and its share of the data.
        json: JSON file to write the figures to.
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


_DATA = (
    "data_name", "split", "text_field", "target_field", "num_samples", "max_length", "pack", "seed",
)  # fmt: skip
_GROUPS = {
    "adapter": (
        "task", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern",
        "alpha_pattern", "use_rslora", "lora_dropout", "bias", "modules_to_save",
    ),
    "start": ("corda_method", "corda_scaling", "corda_weighting", "corda_damping", "corda_beta"),
    "calibration data": ("keep", *_DATA),
    "memory and time": ("batch_size", "max_memory", "checkpoint_dir", "gpus"),
    "loading the model": (
        "device", "device_map", "dtype", "revision", "gguf_file", "trust_remote_code",
    ),
}  # fmt: skip


def _how_to_resume(options: ModelOptions) -> str:
    if options.checkpoint_dir is not None:
        return (
            f"The same command goes on from what is in --checkpoint_dir {options.checkpoint_dir}."
        )
    return (
        "Nothing was written. With --checkpoint_dir FOLDER, a calibration can be interrupted, and the "
        "same command goes on with it."
    )


COMMANDS = {
    "calibrate": Command(
        CalibrateOptions, "calibrate:run_calibrate", groups=_GROUPS, after_ctrl_c=_how_to_resume
    ),
    "report": Command(ReportOptions, "report:run_report", positional=True),
    "init": Command(InitOptions, "adapters:run_init", groups=_GROUPS, after_ctrl_c=_how_to_resume),
    "export": Command(ExportOptions, "adapters:run_export", positional=True),
    "plan": Command(PlanOptions, "plan:run_plan", groups=_GROUPS),
}
