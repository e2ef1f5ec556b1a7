"""Files and folders that are complete or absent, and checks of where output is to go."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

StrPath: TypeAlias = "str | os.PathLike[str]"


def resolved(path: StrPath, name: str = "path") -> str:
    """The absolute path that `path` stands for, without links and `..`.

    Args:
        path: relative to the current folder, or absolute.
        name: of the option that holds it, for the message.

    Raises:
        ValueError: if `path` is empty, as an unset shell variable is.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ValueError(f"{name} is empty ({text!r}). Give the path to write to.")
    return os.path.realpath(text)


def check_output_file(path: StrPath, name: str = "path") -> str:
    """The resolved path of a file that can be written, checked without writing it.

    Raises:
        ValueError: if `path` is empty or a folder.
        OSError: if no file can be made there.
    """
    target = resolved(path, name)
    if os.path.isdir(target) or os.fspath(path).endswith(("/", os.sep)):
        raise ValueError(
            f"{name}={os.fspath(path)!r} is a folder; give the path of the file to write."
        )
    _check_writable(os.path.dirname(target), path, name)
    return target


def check_output_folder(
    path: StrPath, name: str = "path", replaceable: Collection[str] = ()
) -> str:
    """The resolved path of a folder that can be written or replaced, checked without writing it.

    Args:
        path: of a folder that is new or empty, or holds files of these names only.
        name: of the option that holds it, for the message.
        replaceable: names of files that may be replaced with the folder.

    Raises:
        ValueError: if `path` is empty, a file, the current folder or one above it, or holds anything
            else.
        OSError: if no folder can be made there.
    """
    target, shown = resolved(path, name), f"{name}={os.fspath(path)!r}"
    if os.path.lexists(target) and not os.path.isdir(target):
        raise ValueError(f"{shown} is a file; give the path of the folder to write.")
    if _contains(target, os.path.realpath(os.getcwd())):
        raise ValueError(
            f"{shown} is the current folder or one above it. Give the path of a folder of its own."
        )
    others = _others(target, replaceable)
    if others:
        raise ValueError(
            f"{shown} holds other files ({', '.join(others[:3])}), and the whole folder would be "
            "replaced. Give the path of a new folder."
        )
    _check_writable(os.path.dirname(target), path, name)
    return target


def check_distinct(
    outputs: Mapping[str, StrPath | None], inputs: Mapping[str, StrPath | None]
) -> None:
    """Refuse outputs that would overwrite an input or one another.

    Args:
        outputs: by the name of the option; None where it was not given.
        inputs: likewise. Names that are no path here, such as those of a hub, do no harm.

    Raises:
        ValueError: if a path is an output and something else too, or lies in a folder that is an output.
    """
    written = {name: resolved(path, name) for name, path in outputs.items() if path is not None}
    read = {name: os.path.realpath(path) for name, path in inputs.items() if path}
    for name, path in written.items():
        for other, second in {**read, **written}.items():
            if other == name:
                continue
            if _same(path, second):
                raise ValueError(
                    f"{name} and {other} are both {os.fspath(outputs[name] or '')!r}, which would be "
                    f"overwritten. Give another path as {name}."
                )
            if _contains(path, second):
                raise ValueError(
                    f"{other} lies in the folder that {name}={os.fspath(outputs[name] or '')!r} is to "
                    "become. Give paths that are apart."
                )


def check_output_files(
    outputs: Mapping[str, StrPath | None], inputs: Mapping[str, StrPath | None]
) -> None:
    """`check_output_file` for each output that was given, and `check_distinct`."""
    for name, path in outputs.items():
        if path is not None:
            check_output_file(path, name)
    check_distinct(outputs, inputs)


def _same(first: str, second: str) -> bool:
    if first == second:
        return True
    try:
        return os.path.samefile(first, second)  # hard links, and file systems that ignore case
    except OSError:
        return False


def _contains(folder: str, path: str) -> bool:
    """Whether `path` is `folder` or lies in it; both absolute."""
    try:
        return os.path.commonpath([folder, path]) == folder
    except ValueError:  # on different drives
        return False


def _others(folder: str, replaceable: Collection[str]) -> list[str]:
    """What a folder holds beside files of those names."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name not in replaceable or not entry.is_file(follow_symlinks=False)
        )


def _check_writable(directory: str, path: StrPath, name: str) -> None:
    """Raise OSError unless files can be made in a folder, or in the closest one above that exists."""
    closest = directory
    while not os.path.lexists(closest):
        closest = os.path.dirname(closest)
    try:
        with tempfile.TemporaryFile(dir=closest):
            pass
    except OSError as error:
        raise type(error)(
            error.errno, f"Cannot write {name}={os.fspath(path)!r}: {error.strerror}", closest
        ) from error


@contextmanager
def replacing(path: StrPath) -> Iterator[str]:
    """A temporary path to write to; it takes the name `path` when the block ends without an error.

    The folder is made if need be. After an error nothing is left behind, and a file that was there
    before is as it was.

    Raises:
        ValueError: if `path` is empty.
    """
    target = resolved(path)
    directory, base = os.path.split(target)
    os.makedirs(directory, exist_ok=True)
    # Not made by `tempfile`, whose files nobody else may read.
    temporary = os.path.join(directory, f".{base}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path: StrPath, values: Any, indent: int = 1) -> None:
    """Write JSON-ready values; the file appears only when it is complete.

    Raises:
        ValueError: If `path` is empty.
        OSError: If it cannot be written.
    """
    with replacing(path) as temporary, open(temporary, "x", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=indent) + "\n")


@contextmanager
def replacing_folder(path: StrPath, replaceable: Collection[str] = ()) -> Iterator[str]:
    """As `replacing`, for a folder. Nothing is ever deleted but files of the names given.

    Args:
        path: of a folder that is new or empty, or holds files of these names only.
        replaceable: names of files that are deleted with the folder that they are in.

    Raises:
        ValueError, OSError: as `check_output_folder`, at the start and again before the folder is
            replaced.
    """
    target = check_output_folder(path, replaceable=replaceable)
    directory, base = os.path.split(target)
    os.makedirs(directory, exist_ok=True)
    temporary, old = (
        os.path.join(directory, f".{base}.{uuid.uuid4().hex}.{kind}") for kind in ("tmp", "old")
    )
    os.mkdir(temporary)
    try:
        yield temporary
        check_output_folder(target, replaceable=replaceable)
        if os.path.exists(target):
            os.rename(target, old)
        os.rename(temporary, target)
    except BaseException:
        if os.path.exists(old):
            os.rename(old, target)
        raise
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary)
    if os.path.isdir(old):
        for name in replaceable:
            if os.path.isfile(os.path.join(old, name)):
                os.remove(os.path.join(old, name))
        os.rmdir(old)


def atomic_save(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file; it appears only when it is complete.

    Equal contents give equal bytes, and the file may be read by whoever may read new files.

    Raises:
        OSError: if the file cannot be written, as on a full disk.
    """
    with replacing(path) as temporary:
        with open(temporary, "xb"):
            mode = os.stat(temporary).st_mode
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(whole, temporary, metadata=dict(metadata))
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"Cannot write {os.fspath(path)!r}: {error}") from error
        _order_metadata(temporary)
        os.chmod(temporary, mode)  # safetensors lets only the owner read


def _order_metadata(path: str) -> None:
    """Sort the metadata of a safetensors file in place, which come in an order of chance."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))
