"""Names of the tensors of a saved CORDA adapter, and checks that they are complete and sound."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PREFIX = "base_model.model."
#: What an adapter is saved as: the trained changes `ΔA = A − A0` and `ΔB = B − B0`, and the start.
ENDINGS = {
    "A": ".lora_A.weight",
    "B": ".lora_B.weight",
    "A0": ".lora_start_A",
    "B0": ".lora_start_B",
}
#: What versions before 0.2 saved: `A` and `B` themselves, and the start under other names.
OLD_ENDINGS = {**ENDINGS, "A0": ".lora_A0", "B0": ".lora_B0"}


def is_old(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors were saved by a version before 0.2, with `A` and `B` in place of the changes."""
    starts = (OLD_ENDINGS["A0"], OLD_ENDINGS["B0"])
    return any(key.endswith(starts) for key in tensors)


def converted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a saved adapter with the names and meanings of today, whichever version saved them.

    Raises:
        ValueError: As `modules_of`.
    """
    result = dict(tensors)
    for keys in modules_of(tensors).values() if is_old(tensors) else ():
        for part, start in (("A", "A0"), ("B", "B0")):
            result[keys[part]] = change_of(tensors[keys[part]], tensors[keys[start]])
            name = keys[start].removesuffix(OLD_ENDINGS[start])
            result[name + ENDINGS[start]] = result.pop(keys[start])
    return result


def change_of(factor: Tensor, start: Tensor) -> Tensor:
    """Returns `A − A0` (or `B − B0`), rounded once, to the dtype of the factor."""
    wide = torch.promote_types(factor.dtype, torch.float32)
    return (factor.to(wide) - start.to(factor.device, wide)).to(factor.dtype)


def modules_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Returns the keys of `A`, `B`, `A0` and `B0` by module name.

    Raises:
        ValueError: If a module has some of the four tensors, but not all.
    """
    endings = OLD_ENDINGS if is_old(tensors) else ENDINGS
    names = {
        key.removesuffix(end): None
        for key in tensors
        for end in endings.values()
        if key.endswith(end)
    }
    modules = {
        name.removeprefix(PREFIX): {part: name + end for part, end in endings.items()}
        for name in names
    }
    missing = [key for keys in modules.values() for key in keys.values() if key not in tensors]
    if missing:
        raise incomplete(f"{len(missing)} tensors, such as {missing[0]}")
    return modules


def incomplete(what: str) -> ValueError:
    """Returns the error about a checkpoint that lacks tensors."""
    return ValueError(
        f"The checkpoint lacks {what}. A CORDA adapter is saved with its start (lora_start_A and "
        "lora_start_B), "
        "without which it computes something else. Save it again with save_pretrained, with all its "
        "parameters gathered, or use an earlier checkpoint."
    )


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Checks the tensors of a saved adapter, before they are loaded.

    Raises:
        ValueError: If tensors of a module are missing, their shapes do not match, or they hold NaN or
            infinite values.
    """
    for name, keys in modules_of(tensors).items():
        found = {part: tensors[key] for part, key in keys.items()}
        check_shapes(name, found)
        for tensor in found.values():
            if not tensor.is_meta and not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"The adapter of {name} has NaN or infinite values in the checkpoint: the file is "
                    "damaged, or training diverged. Load an earlier checkpoint."
                )


def check_shapes(name: str, found: Mapping[str, Tensor]) -> None:
    """Checks that the shapes of `A`, `B`, `A0` and `B0` of a module belong together."""
    a, b, a0, b0 = (found[part] for part in ENDINGS)
    if a.shape != a0.shape or b.shape != b0.shape or b.shape[1] != a.shape[0]:
        raise ValueError(
            f"The shapes of the factors of {name} do not match: A {tuple(a.shape)}, "
            f"B {tuple(b.shape)}, A0 {tuple(a0.shape)}, B0 {tuple(b0.shape)}. Save the adapter again."
        )


def check_folder(folder: str | None) -> None:
    """Checks the tensors of a checkpoint in a local folder, if it holds any.

    Raises:
        ValueError: As `check_tensors`, or if the file is not readable.
    """
    path = os.path.join(folder or "", SAFETENSORS_WEIGHTS_NAME)
    if folder is None or not os.path.isfile(path):
        return
    check_tensors(read_tensors(path))


def read_tensors(path: str) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ValueError: If it is not readable.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path!r} is not a readable safetensors file: {error}") from error
