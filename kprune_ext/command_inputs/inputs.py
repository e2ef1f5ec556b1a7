"""Model and data of the commands that prune."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from .. import modeling
from ..common.command_line import TASKS
from ..common.text_data import load_rows
from ..modeling.classes import model_task
from .language_inputs import answered_prompts, packed_windows, sequence_tokens

if TYPE_CHECKING:
    from .options import CalibratedOptions

#: Tokens per sequence of encoders if the options do not say.
LENGTH = 128


@dataclass(frozen=True)
class Loaded:
    """A model to prune, and what it is pruned with.

    Attributes:
        about: Config of the model.
        model: The model, on its device.
        processor: Its tokenizer or image processor.
        rows: The calibration data, in the order in which they are taken.
    """

    about: Any
    model: PreTrainedModel
    processor: Any
    rows: Any

    def batches(self, rows: Any, options: CalibratedOptions) -> Iterator[dict[str, Any]]:
        """Returns an iterator over batches of data, as the model takes them.

        Raises:
            ValueError: If the data lack the fields that the options name.
        """
        if self.model.main_input_name == "pixel_values":
            return image_batches(rows, self.processor, options)
        make = language_batches if model_task(self.model).is_causal else text_batches
        return make(rows, self.processor, options, self.about)


def load_all(options: CalibratedOptions) -> Loaded:
    """Loads data and model of a command that prunes.

    Raises:
        ValueError, OSError: If an option is invalid, or something cannot be loaded.
    """
    if options.device is not None and options.device_map is not None:
        raise ValueError("Pass either device or device_map, not both.")
    if min(options.max_length or 1, options.batch_size) < 1 or options.max_length == 0:
        raise ValueError("max_length and batch_size must be at least 1.")
    if options.seed < 0:
        raise ValueError(f"seed={options.seed} is negative. Pass 0 or more.")
    check_device(options.device)
    about = AutoConfig.from_pretrained(options.model, revision=options.revision)
    rows = load_rows(options.data, name=options.data_name, split=options.split)
    rows = rows.shuffle(seed=options.seed)
    model = load_model(options, about)
    images = model.main_input_name == "pixel_values"
    kind: Any = AutoImageProcessor if images else AutoTokenizer
    return Loaded(
        about, model, kind.from_pretrained(options.model, revision=options.revision), rows
    )


def load_model(options: CalibratedOptions, about: Any) -> PreTrainedModel:
    """Loads the model to prune, on its device.

    Args:
        options: Options of the command.
        about: Config of the model.

    Raises:
        ValueError: If the task cannot be inferred from the config.
    """
    if options.task in TASKS:
        kind: Any = getattr(transformers, TASKS[options.task])
    else:
        known = (transformers, modeling)  # modeling: for models that were pruned before
        written = [
            getattr(module, name)
            for name in about.architectures or []
            for module in known
            if hasattr(module, name)
        ]
        if not written:
            raise ValueError(
                f"The config of {options.model!r} does not say what task the model is for. Pass task "
                f"as one of {', '.join(TASKS)}."
            )
        kind = written[0]
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    device_map = "auto" if options.device == "auto" else options.device_map
    placed = {"device_map": device_map} if device_map else {}
    model = kind.from_pretrained(options.model, dtype=dtype, revision=options.revision, **placed)
    if device_map is None:
        model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded: PreTrainedModel = model.eval()
    return loaded


def check_device(device: str | None) -> None:
    """Checks that a device can be used, before anything is loaded.

    Raises:
        ValueError: If there is no such device.
    """
    if device is None or device == "auto":
        return
    try:
        if torch.device(device).type == "meta":
            raise ValueError("it computes nothing")
        torch.zeros(1, device=device)
    except Exception as error:  # of each kind of device
        raise ValueError(
            f"device={device!r} cannot be used here ({str(error).splitlines()[0][:200]}). Pass cpu, or "
            "a GPU of this machine such as cuda:0."
        ) from error


def check_fields(rows: Any, names: list[str], option: str, wanted: str) -> None:
    """Checks that the data have fields, and that these hold texts or images, as `wanted` says."""
    from datasets import Image, Value

    for name in names:
        if name not in rows.column_names:
            raise ValueError(
                f"The data have no field {name!r}; their fields are "
                f"{', '.join(rows.column_names)}. Pass the right one as {option}."
            )
        kind = rows.features[name]
        is_text = isinstance(kind, Value) and "string" in kind.dtype
        if not (is_text if wanted == "text" else isinstance(kind, Image)):
            found = kind.dtype if isinstance(kind, Value) else type(kind).__name__
            raise ValueError(
                f"The field {name!r} holds values of type {found}, not {wanted}. Pass the name of a "
                f"field with {wanted} as {option}."
            )


def text_batches(
    rows: Any, tokenizer: Any, options: CalibratedOptions, about: Any
) -> Iterator[dict[str, Any]]:
    """Returns an iterator over batches of a data set's texts, tokenised; empty fields are left out.

    Args:
        rows: The data set.
        tokenizer: Tokenizer of the model.
        options: Options of the command.
        about: Config of the model.

    Raises:
        ValueError: If the number of text fields is not one or two, or the data lack one of them, or
            sequences have no room for text.
    """
    names, label = text_fields(rows, options), _label_field(rows)
    wanted = options.max_length or LENGTH
    most = getattr(about, "max_position_embeddings", None) or wanted
    length = min(wanted, most, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair=len(names) == 2)
    if length < special + len(names):
        raise ValueError(
            f"max_length={length} has no room for text: the tokenizer adds {special} tokens to each "
            f"sequence. Pass at least {special + len(names)}, such as the default of 128."
        )

    def batches() -> Iterator[dict[str, Any]]:
        for part in rows.select_columns([*names, *label]).iter(options.batch_size):
            every = zip(*(part[name] for name in [*names, *label]), strict=True)
            texts = [texts for texts in every if None not in texts[: len(names)]]
            if not texts:
                continue
            columns = [list(column) for column in zip(*texts, strict=True)]
            own = tokenizer(
                *columns[: len(names)],
                truncation=True,
                max_length=length,
                padding=True,
                return_tensors="pt",
            )
            yield {**own, **_as_labels(columns[len(names) :])}

    return batches()


def text_fields(rows: Any, options: CalibratedOptions, option: str = "text_field") -> list[str]:
    """Returns the names of the fields with text, which the data have.

    Args:
        rows: The data set.
        options: Options of the command.
        option: Name of the option that names the fields.

    Raises:
        ValueError: If the number of text fields is not one or two, or the data lack one of them.
    """
    given = getattr(options, option)
    names = [given] if isinstance(given, str) else given
    if not 1 <= len(names) <= 2:
        raise ValueError(f"{option} takes the name of one field, or of two for text pairs.")
    check_fields(rows, list(names), option, "text")
    return list(names)


def language_batches(
    rows: Any, tokenizer: Any, options: CalibratedOptions, about: Any
) -> Iterator[dict[str, Any]]:
    """Returns an iterator over batches for a causal language model; empty fields are left out.

    The texts of one field are packed into windows. Of two fields the first is a prompt, and the second
    its answer, whose tokens alone are to be predicted.

    Args:
        rows: The data set.
        tokenizer: Tokenizer of the model.
        options: Options of the command.
        about: Config of the model.

    Raises:
        ValueError: As for `text_batches`.
    """
    names = text_fields(rows, options)
    length = sequence_tokens(options, tokenizer, about)
    chosen = rows.select_columns(names)
    if len(names) == 1:
        texts = (row[names[0]] for row in chosen if row[names[0]])
        return packed_windows(texts, tokenizer, length, options.batch_size)
    pairs = ((row[names[0]], row[names[1]]) for row in chosen if row[names[0]] and row[names[1]])
    return answered_prompts(pairs, tokenizer, length, options.batch_size)


def image_batches(
    rows: Any, processor: Any, options: CalibratedOptions
) -> Iterator[dict[str, Any]]:
    """Returns an iterator over batches of a data set's images, preprocessed for the model.

    Args:
        rows: The data set.
        processor: Image processor of the model.
        options: Options of the command.

    Raises:
        ValueError: If the data lack the image field, or, in the iterator, an image cannot be read.
    """
    from datasets import Image

    name = options.image_field
    check_fields(rows, [name], "image_field", "images")
    decoder = Image(mode=rows.features[name].mode)
    label = _label_field(rows)
    undecoded = rows.select_columns([name, *label]).cast_column(name, Image(decode=False))

    def batches() -> Iterator[dict[str, Any]]:
        for part in undecoded.iter(options.batch_size):
            there = [number for number, value in enumerate(part[name]) if value is not None]
            images = [_image(decoder, part[name][number], name) for number in there]
            if images:
                labels = [[part[each][number] for number in there] for each in label]
                yield {**processor(images, return_tensors="pt"), **_as_labels(labels)}

    return batches()


def _label_field(rows: Any) -> list[str]:
    """Returns the name of the field with the numbers of classes, by which the result is judged."""
    for name in ("label", "labels"):
        if name in rows.column_names and "int" in str(getattr(rows.features[name], "dtype", "")):
            return [name]
    return []


def _as_labels(columns: list[list[Any]]) -> dict[str, Any]:
    """Returns a column of class numbers, if there is one, as an entry of a batch; -100 is none."""
    if not columns:
        return {}
    return {"labels": torch.tensor([-100 if value is None else value for value in columns[0]])}


def _image(decoder: Any, stored: dict[str, Any], name: str) -> Any:
    try:
        return decoder.decode_example(stored).convert("RGB")
    except Exception as error:  # each image format has its own
        where = stored.get("path") or f"of {len(stored.get('bytes') or b'')} bytes"
        raise ValueError(
            f"An image in the field {name!r} ({where}) cannot be read ({type(error).__name__}: "
            f"{str(error)[:200]}). Replace it, or leave its row out of the data."
        ) from error
