"""`CordaFactors`, the result of a calibration, which can be saved, loaded and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kprune_ext.common.fingerprints import WeightSample, same_sample
from kprune_ext.common.version import installed_version
from kprune_ext.files.writing import atomic_save

from .decomposition.directions import ALL_METHODS, Directions
from .decomposition.sketch import InputSketch
from .soundness import CHECKSUM, check_sketch, check_sound, check_sum, checksum_of

FORMAT = "peft_corda.factors"
FORMAT_VERSION = 2
_PARTS = ("U", "S", "weight_norms")
_SKETCH = "input_sketch"


@dataclass(frozen=True, eq=False)
class ModuleFactors:
    """Result of calibration for one linear layer with weight `W (out, in)`.

    Attributes:
        directions: Directions by method, `"kpm"` or `"ipm"`, of the largest requested rank.
        shape: Shape of `W`, `(out, in)`.
        weight_sample: Entries of `W`, `(SAMPLE_SIZE,)`, which tell whether a base model is the one
            that was calibrated.
        energy: The sum of all squared singular values, `‖W F‖²`.
        effective_rank: Effective number of directions of the inputs, between 1 and `in`
            (`covariance.effective_rank`); None where only a cross-covariance was collected.
        tokens: Number of calibration tokens that the layer received.
        inputs: Name of the layer whose sketch of the inputs is also that of this layer; None if there
            is no sketch.
        output_energy: Mean of `‖W x‖²` over the calibration data, estimated from the sketch.
    """

    directions: Mapping[str, Directions]
    shape: tuple[int, int]
    weight_sample: Tensor
    energy: float
    effective_rank: float | None
    tokens: int
    inputs: str | None = None
    output_energy: float = 0.0


@dataclass(frozen=True, eq=False, repr=False)
class CordaFactors:
    """Result of `calibrate`: the singular directions of every target module.

    Adapters of any smaller rank, and of every method in `methods`, can be initialized from it.

    Attributes:
        modules: Factors by module name, as in `model.named_modules()` of the base model.
        damping: The λ of the damped covariance.
        weighting: Either `"covariance"` or `"sqrt_covariance"`.
        sketches: Sketches of the inputs, by the first of the layers that share them.
    """

    modules: Mapping[str, ModuleFactors]
    damping: float
    weighting: str = "covariance"
    sketches: Mapping[str, InputSketch] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods for which every module has directions."""
        return tuple(
            method
            for method in ALL_METHODS
            if all(method in module.directions for module in self.modules.values())
        )

    @property
    def tokens(self) -> int:
        """Number of calibration tokens: the minimum over the modules."""
        return min(module.tokens for module in self.modules.values())

    def rank(self, name: str, method: str) -> int:
        """Returns the largest rank of an adapter that a module's directions allow."""
        return self.modules[name].directions[method].rank

    def __repr__(self) -> str:
        return (
            f"CordaFactors(methods={self.methods}, modules={len(self.modules)}, "
            f"tokens={self.tokens}, damping={self.damping}, weighting={self.weighting!r}, "
            f"sketches={len(self.sketches)})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CordaFactors:
        # Factors are immutable and as large as an adapter, so copies of a config share them.
        return self

    def without_directions(self) -> CordaFactors:
        """Returns what `forgetting` needs and no more: the sketches of the inputs.

        An adapter cannot be started from it, and its file is smaller.
        """
        modules = {name: replace(module, directions={}) for name, module in self.modules.items()}
        return replace(self, modules=modules)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the factors to one safetensors file, which appears only when it is complete."""
        tensors, metadata = contents_of(self)
        atomic_save(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CordaFactors:
        """Reads a file written by `save`.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file is not a factors file, has another format version, or is damaged.
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
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                modules = {
                    name: _read_module(tensors, name, about)
                    for name, about in json.loads(metadata["modules"]).items()
                }
                sketches = {
                    name: InputSketch(tensors[f"{name}.{_SKETCH}"], about["input_energy"])
                    for name, about in json.loads(metadata["modules"]).items()
                    if "input_energy" in about
                }
                damping, weighting = float(metadata["damping"]), metadata["weighting"]
                check_sum(path, tensors, metadata)
        except (
            SafetensorError,
            LookupError,
            TypeError,
            AttributeError,
            json.JSONDecodeError,
        ) as error:
            raise ValueError(f"{path!r} is not a readable factors file: {error}") from error
        for name, module in modules.items():
            check_sound(name, module.directions, module.shape, module.weight_sample)
            check_sketch(name, module.inputs, module.shape, sketches)
        return cls(modules, damping, weighting, sketches)

    def check_fits(
        self,
        method: str,
        weighting: str,
        ranks: Mapping[str, int],
        weights: Mapping[str, WeightSample],
    ) -> None:
        """Checks that the factors belong to this base model and reach these ranks.

        Args:
            method: Method of the adapter.
            weighting: Weighting of the adapter.
            ranks: Rank of the adapter by module name.
            weights: Weight samples of the current base model, by module name.

        Raises:
            ValueError: If the method, weighting, modules, shapes, weights or ranks differ. The
                message names the difference. Also if factors have NaN or infinite values.
        """
        if method not in self.methods:
            raise ValueError(
                f"The factors were made for corda_method={' and '.join(map(repr, self.methods))}, but "
                f"the config asks for {method!r}. Calibrate again with methods=('kpm', 'ipm'), or "
                "change the config's corda_method."
            )
        if weighting != self.weighting:
            raise ValueError(
                f"The factors were made with corda_weighting={self.weighting!r}, but the config asks "
                f"for {weighting!r}. Change the config's corda_weighting, or calibrate again."
            )
        missing = [name for name in weights if name not in self.modules]
        if missing:
            raise ValueError(
                f"The factors have no entry for {_listed(missing)}, which the config targets; they "
                f"hold {_listed(list(self.modules))}. They were made for another base model or other "
                "target_modules. Calibrate again with this model and config."
            )
        reshaped = [
            f"{name}: {tuple(seen.shape)} here, {tuple(self.modules[name].shape)} in the factors"
            for name, seen in weights.items()
            if tuple(seen.shape) != tuple(self.modules[name].shape)
        ]
        if reshaped:
            raise ValueError(
                f"The factors belong to another base model: weight shapes (out, in) differ for "
                f"{_listed(reshaped)}. Calibrate again with this model."
            )
        changed = [
            name
            for name, seen in weights.items()
            if not same_sample(seen, self.modules[name].weight_sample)
        ]
        if changed:
            raise ValueError(
                f"The factors belong to another base model: the weights of {_listed(changed)} are not "
                "those that were calibrated. Load the original base model, or calibrate again."
            )
        for name in weights:
            module = self.modules[name]
            check_sound(name, module.directions, module.shape, module.weight_sample)
        short = [
            f"{name}: rank {rank} requested, {self.rank(name, method)} in the factors"
            for name, rank in ranks.items()
            if rank > self.rank(name, method)
        ]
        if short:
            raise ValueError(
                f"The factors have too small a rank for {_listed(short)}. Lower r (or rank_pattern), "
                "or calibrate again with the larger rank."
            )


def contents_of(factors: CordaFactors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns tensors and metadata of the file of factors."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, module in factors.modules.items():
        tensors[f"{name}.weight_sample"] = module.weight_sample
        for method, found in module.directions.items():
            for part in _PARTS:
                tensors[f"{name}.{method}.{part}"] = getattr(found, part)
        about[name] = {
            "methods": list(module.directions),
            "shape": list(module.shape),
            "energy": module.energy,
            "effective_rank": module.effective_rank,
            "tokens": module.tokens,
        }
        if module.inputs is not None:
            about[name] |= {"inputs": module.inputs, "output_energy": module.output_energy}
        if name in factors.sketches:
            sketch = factors.sketches[name]
            tensors[f"{name}.{_SKETCH}"] = sketch.rows
            about[name]["input_energy"] = sketch.energy
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "peft_corda_version": installed_version(),
        "methods": json.dumps(factors.methods),
        "damping": repr(factors.damping),
        "weighting": factors.weighting,
        "tokens": str(factors.tokens),
        "modules": json.dumps(about),
    }
    return tensors, {**metadata, CHECKSUM: checksum_of(tensors, metadata)}


def _read_module(
    tensors: Mapping[str, Tensor], name: str, about: Mapping[str, Any]
) -> ModuleFactors:
    return ModuleFactors(
        directions={
            method: Directions(**{part: tensors[f"{name}.{method}.{part}"] for part in _PARTS})
            for method in about["methods"]
        },
        shape=(about["shape"][0], about["shape"][1]),
        weight_sample=tensors[f"{name}.weight_sample"],
        energy=about["energy"],
        effective_rank=about["effective_rank"],
        tokens=about["tokens"],
        inputs=about.get("inputs"),
        output_energy=about.get("output_energy", 0.0),
    )


def _check_format(path: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path!r} is a safetensors file, but not a factors file of peft_corda. Pass a file "
            "written by CordaFactors.save. Load a saved adapter with PeftModel.from_pretrained."
        )
    if metadata["format_version"] != str(FORMAT_VERSION):
        raise ValueError(
            f"{path!r} has format version {metadata['format_version']}, but this version of peft_corda "
            f"reads version {FORMAT_VERSION}. It was written by peft-corda "
            f"{metadata.get('peft_corda_version')}. Use that version, or calibrate again."
        )


def _listed(items: list[str], most: int = 3) -> str:
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
