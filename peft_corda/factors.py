"""`CordaFactors`: what a calibration found, as a value that can be saved, loaded and checked."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "peft_corda.factors"
FORMAT_VERSION = 1
# Number of weight entries kept per module to recognise the base model again.
SAMPLE_SIZE = 32
# Two roundings of one weight to bfloat16 differ by less than this, relative to its size.
SAMPLE_RTOL = 2.0**-7


@dataclass(frozen=True, eq=False)
class ModuleFactors:
    """Singular directions of one linear layer with weight `W (out, in)`.

    Attributes:
        U: `(out, rank)`, orthonormal left singular vectors of `W C`, the most wanted first: largest
            singular value first for ``ipm``, smallest first for ``kpm``. The first `r` columns are
            the factors for any smaller rank `r`.
        S: `(rank,)`, their singular values.
        weight_sample: `(SAMPLE_SIZE,)`, entries of `W` that tell whether a base model is the one
            that was calibrated.
        shape: `(out, in)` of `W`.
    """

    U: Tensor
    S: Tensor
    weight_sample: Tensor
    shape: tuple[int, int]

    @property
    def rank(self) -> int:
        return self.U.shape[1]


@dataclass(frozen=True, eq=False, repr=False)
class CordaFactors:
    """Result of `calibrate`: the directions that adapters are cut along, for every target module.

    Attributes:
        modules: factors by module name, as in `model.named_modules()` of the base model.
        method: ``"kpm"`` or ``"ipm"``.
        damping: λ of the damped covariance.
        tokens: calibration tokens seen (the fewest over the modules).
    """

    modules: Mapping[str, ModuleFactors]
    method: str
    damping: float
    tokens: int

    def __repr__(self) -> str:
        return (
            f"CordaFactors(method={self.method!r}, modules={len(self.modules)}, "
            f"tokens={self.tokens}, damping={self.damping})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CordaFactors:
        # Immutable, and as large as an adapter: copies of a config share it.
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the factors to one safetensors file; the file appears only when it is complete."""
        from . import __version__

        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            tensors[f"{name}.U"] = module.U.contiguous()
            tensors[f"{name}.S"] = module.S.contiguous()
            tensors[f"{name}.weight_sample"] = module.weight_sample.contiguous()
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "peft_corda_version": __version__,
            "method": self.method,
            "damping": repr(self.damping),
            "tokens": str(self.tokens),
            "shapes": json.dumps({name: m.shape for name, m in self.modules.items()}),
        }
        path = os.fspath(path)
        directory = os.path.dirname(os.path.abspath(path))
        os.makedirs(directory, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".corda-", suffix=".tmp", dir=directory)
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CordaFactors:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a factors file, or one of a newer format.
        """
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"No factors file at {path!r}. Write one with "
                "calibrate(model, config, dataloader).save(path)."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                _check_format(path, metadata)
                modules = {
                    name: ModuleFactors(
                        U=file.get_tensor(f"{name}.U"),
                        S=file.get_tensor(f"{name}.S"),
                        weight_sample=file.get_tensor(f"{name}.weight_sample"),
                        shape=(shape[0], shape[1]),
                    )
                    for name, shape in json.loads(metadata["shapes"]).items()
                }
        except SafetensorError as error:
            raise ValueError(f"{path!r} is not a readable factors file: {error}") from error
        return cls(
            modules=modules,
            method=metadata["method"],
            damping=float(metadata["damping"]),
            tokens=int(metadata["tokens"]),
        )

    def check_fits(
        self, method: str, ranks: Mapping[str, int], weights: Mapping[str, tuple[Tensor, Any]]
    ) -> None:
        """Raise unless the factors belong to this base model and reach these ranks.

        Args:
            method: the method that the adapter asks for.
            ranks: wanted rank by module name.
            weights: weight sample and weight shape by module name, of the base model at hand.

        Raises:
            ValueError: naming what differs: the method, missing modules, shapes, weights or ranks.
        """
        if self.method != method:
            raise ValueError(
                f"The factors were made for corda_method={self.method!r}, but the config asks for "
                f"{method!r}. Calibrate again with this config, or change its corda_method."
            )
        missing = [name for name in weights if name not in self.modules]
        if missing:
            raise ValueError(
                f"The factors have no entry for {_listed(missing)}, which the config targets; they "
                f"hold {_listed(list(self.modules))}. They were made for another base model or other "
                "target_modules: calibrate again with this model and config."
            )
        reshaped = [
            f"{name}: {tuple(shape)} here, {tuple(self.modules[name].shape)} in the factors"
            for name, (_, shape) in weights.items()
            if tuple(shape) != tuple(self.modules[name].shape)
        ]
        if reshaped:
            raise ValueError(
                f"The factors belong to another base model: weight shapes (out, in) differ for "
                f"{_listed(reshaped)}. Calibrate again with this model."
            )
        changed = [
            name
            for name, (sample, _) in weights.items()
            if not _same_sample(sample, self.modules[name].weight_sample)
        ]
        if changed:
            raise ValueError(
                f"The factors belong to another base model: the weights of {_listed(changed)} are not "
                "those that were calibrated. Load the original base, or calibrate again."
            )
        short = [
            f"{name}: rank {rank} wanted, {self.modules[name].rank} in the factors"
            for name, rank in ranks.items()
            if rank > self.modules[name].rank
        ]
        if short:
            raise ValueError(
                f"The factors are of too small a rank for {_listed(short)}. Lower r (or rank_pattern), "
                "or calibrate again with the larger rank."
            )


def sample_of(weight: Tensor) -> Tensor:
    """`SAMPLE_SIZE` entries of a weight, spread evenly over it, in float32."""
    flat = weight.reshape(-1)
    positions = torch.linspace(0, flat.numel() - 1, SAMPLE_SIZE, dtype=torch.float64).long()
    return flat[positions.to(flat.device)].float().cpu()


def _same_sample(ours: Tensor, theirs: Tensor) -> bool:
    # The same base in another float dtype is still the same base.
    scale = theirs.abs().max()
    return bool(torch.allclose(ours, theirs, rtol=SAMPLE_RTOL, atol=float(scale) * 1e-6))


def _check_format(path: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path!r} is a safetensors file, but not a factors file of peft_corda. Pass a file "
            "written by CordaFactors.save; a saved adapter is loaded with PeftModel.from_pretrained."
        )
    if int(metadata["format_version"]) > FORMAT_VERSION:
        raise ValueError(
            f"{path!r} has format version {metadata['format_version']}, this version of peft_corda "
            f"reads up to {FORMAT_VERSION}. Update peft-corda."
        )


def _listed(items: list[str], most: int = 3) -> str:
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
