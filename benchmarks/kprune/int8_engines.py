"""Embedders as programs of onnxruntime and of OpenVINO, in float32 and in 8 bits.

onnxruntime quantises dynamically: weights by channel ahead, activations as they come. OpenVINO's tools
(NNCF) quantise statically: ranges of activations are measured on sentences ahead, and outlying channels
are evened out between a matrix and what comes before it (SmoothQuant).
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from kprune_ext.evaluation.pooling import pooled

from .int8_tables import PRECISIONS

NAMES = ["input_ids", "attention_mask"]
#: Batches that static quantisation measures ranges on.
BATCHES = 10


@dataclass(frozen=True)
class Program:
    """An embedder as an engine runs it.

    Attributes:
        engine: The engine.
        precision: Format of the weights.
        mib: Size of its files.
        compute: The embeddings `(texts, hidden)` of ids and masks.
    """

    engine: str
    precision: str
    mib: float
    compute: Callable[[list[numpy.ndarray]], numpy.ndarray]

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """The embeddings of a batch."""
        return torch.from_numpy(self.compute([batch[name].numpy() for name in NAMES]))


class Embedder(nn.Module):
    """A model whose arguments and result are tensors, as exporters need it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pooled(hidden, attention_mask, "mean")


def check_engines(names: Iterable[str]) -> None:
    """End with what to install if an engine's packages are missing."""
    missing = [
        package
        for package in ("openvino", "nncf")
        if "openvino" in names and importlib.util.find_spec(package) is None
    ]
    if missing:
        sys.exit(f"OpenVINO's programs need more packages: pip install {' '.join(missing)}")


def programs(
    model: Any,
    folder: Path,
    batches: Iterable[dict[str, Tensor]],
    engines: Sequence[str],
    threads: int,
) -> list[Program]:
    """The model as programs of all engines in both precisions.

    Args:
        model: The embedder.
        folder: Folder for the programs' files.
        batches: Sentences, of which the first are used to quantise.
        engines: Names from `int8_tables.ENGINES`.
        threads: Threads of each program.
    """
    path = exported(model, folder / "float32.onnx")
    made = {"onnxruntime": onnxruntime_programs, "openvino": openvino_programs}
    few = [{name: batch[name].numpy() for name in NAMES} for batch in islice(batches, BATCHES)]
    return [program for name in engines for program in made[name](path, few, threads)]


def exported(model: Any, path: Path) -> Path:
    """The model as an ONNX file for batches of any shape."""
    ids = torch.randint(5, model.config.vocab_size, (2, 16))
    shape = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Embedder(model).eval(),
            (ids, torch.ones_like(ids)),
            path,
            input_names=NAMES,
            dynamic_shapes=dict.fromkeys(NAMES, shape),
            dynamo=True,
        )
    return path


def onnxruntime_programs(
    path: Path, batches: list[dict[str, numpy.ndarray]], threads: int
) -> list[Program]:
    """An ONNX file in onnxruntime, as it is and quantised there."""
    narrow = path.with_name("int8.onnx")
    quantize_dynamic(path, narrow, per_channel=True, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    found = []
    for precision, file in zip(PRECISIONS, (path, narrow), strict=True):
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

        def compute(given: list[numpy.ndarray], session: Any = session) -> numpy.ndarray:
            found: numpy.ndarray = session.run(None, dict(zip(NAMES, given, strict=True)))[0]
            return found

        found.append(
            Program("onnxruntime", precision, _mib(file.parent.glob(f"{file.name}*")), compute)
        )
    return found


def openvino_programs(
    path: Path, batches: list[dict[str, numpy.ndarray]], threads: int
) -> list[Program]:
    """An ONNX file in OpenVINO, as it is and quantised by NNCF on batches."""
    import nncf
    import openvino

    core = openvino.Core()
    wide = core.read_model(path)
    kind = nncf.ModelType.TRANSFORMER
    narrow = nncf.quantize(wide, nncf.Dataset(batches), model_type=kind, subset_size=len(batches))
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    found = []
    for precision, model in zip(PRECISIONS, (wide, narrow), strict=True):
        openvino.save_model(model, path.with_name(f"{precision}.xml"), compress_to_fp16=False)
        compiled = core.compile_model(model, "CPU", settings)

        def compute(given: list[numpy.ndarray], compiled: Any = compiled) -> numpy.ndarray:
            found: numpy.ndarray = compiled(given)[0].copy()  # the buffer is used again
            return found

        files = [path.with_name(f"{precision}.{end}") for end in ("xml", "bin")]
        found.append(Program("openvino", precision, _mib(files), compute))
    return found


def _mib(files: Iterable[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 2**20
