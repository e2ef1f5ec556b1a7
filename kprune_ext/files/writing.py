"""Atomic writing of files and folders, and checks of output paths."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .locks import locked
from .replacement import (
    clean_up,
    contains,
    create_as,
    delete_files,
    leftovers,
    named_errors,
    other_entries,
    remove,
    same_file,
    take_mode,
    unfinished_name,
)

StrPath: TypeAlias = "str | os.PathLike[str]"


def resolved(path: StrPath, name: str = "path") -> str:
    """Returns the absolute path of `path`, without symbolic links and `..`.

    Args:
        path: The path, absolute or relative to the current folder.
        name: Name of the option that holds it, for the message.

    Raises:
        ValueError: If `path` is empty, as with an unset shell variable.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ValueError(f"{name} is empty ({text!r}). Give the path to write to.")
    return os.path.realpath(text)


def check_output_file(path: StrPath, name: str = "path") -> str:
    """Returns the resolved path of an output file, after checking that it can be written.

    The file itself is not touched.

    Raises:
        ValueError: If `path` is empty or a folder.
        OSError: If no file can be created there.
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
    """Returns the resolved path of an output folder, after checking that it can be written.

    The folder itself is not touched, whether it is new or is to be replaced.

    Args:
        path: Path of a folder that is new or empty, or holds only files named in `replaceable`.
        name: Name of the option that holds the path, for the message.
        replaceable: Names of files that may be replaced with the folder.

    Raises:
        ValueError: If `path` is empty, a file, the current folder or one above it, or a folder that
            holds anything else.
        OSError: If no folder can be created there.
    """
    target, shown = resolved(path, name), f"{name}={os.fspath(path)!r}"
    if os.path.lexists(target) and not os.path.isdir(target):
        raise ValueError(f"{shown} is a file; give the path of the folder to write.")
    if contains(target, os.path.realpath(os.getcwd())):
        raise ValueError(
            f"{shown} is the current folder or one above it. Give the path of a separate folder."
        )
    others = other_entries(target, replaceable)
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
    """Refuses outputs that would overwrite an input or one another.

    Args:
        outputs: Output paths by name of the option; None where the option was not given.
        inputs: Input paths likewise. Names that are not local paths, such as hub ids, are harmless.

    Raises:
        ValueError: If an output is also another output or an input, or if one of these lies in an
            output folder.
    """
    written = {name: resolved(path, name) for name, path in outputs.items() if path is not None}
    read = {name: os.path.realpath(path) for name, path in inputs.items() if path}
    for name, path in written.items():
        for other, second in {**read, **written}.items():
            if other == name:
                continue
            if same_file(path, second):
                raise ValueError(
                    f"{name} and {other} are both {os.fspath(outputs[name] or '')!r}, which would be "
                    f"overwritten. Give a different path as {name}."
                )
            if contains(path, second):
                raise ValueError(
                    f"{other} lies in the folder {name}={os.fspath(outputs[name] or '')!r}, which would "
                    "be replaced. Give a path outside of it."
                )


def check_output_files(
    outputs: Mapping[str, StrPath | None], inputs: Mapping[str, StrPath | None]
) -> None:
    """Calls `check_output_file` for each output that was given, and `check_distinct` for all."""
    for name, path in outputs.items():
        if path is not None:
            check_output_file(path, name)
    check_distinct(outputs, inputs)


def _check_writable(directory: str, path: StrPath, name: str) -> None:
    """Raises OSError unless files can be created in a folder or its closest existing parent."""
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
    """Gives a temporary path to write to; it is renamed to `path` if the block succeeds.

    Its folder is created if necessary. After an error the temporary file is removed, and an earlier
    file at `path` is unchanged. The new file has the permissions of an earlier one.

    Yields:
        The temporary path.

    Raises:
        ValueError: If `path` is empty.
    """
    target = resolved(path)
    directory, base = os.path.split(target)
    os.makedirs(directory, exist_ok=True)
    for left in leftovers(directory, base, "tmp"):
        remove(left)
    # Not from `tempfile`, whose files only their owner may read.
    temporary = os.path.join(directory, unfinished_name(base, "tmp"))
    try:
        with named_errors(f"Cannot write {os.fspath(path)!r}"):
            yield temporary
            take_mode(target, temporary)
            os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path: StrPath, values: Any, indent: int = 1) -> None:
    """Writes JSON-serializable values; the file appears only when it is complete.

    Raises:
        ValueError: If `path` is empty.
        OSError: If the file cannot be written.
    """
    with replacing(path) as temporary:
        create_as(path, temporary)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=indent) + "\n")


@contextmanager
def replacing_folder(path: StrPath, replaceable: Collection[str] = ()) -> Iterator[str]:
    """Gives a temporary folder to write to; it replaces `path` if the block succeeds.

    As `replacing`, for a folder. Only files named in `replaceable` are ever deleted. If another process
    or thread is writing the same folder, this waits until it is done.

    Args:
        path: Path of a folder that is new or empty, or holds only files named in `replaceable`.
        replaceable: Names of files that are deleted with the folder that they are in.

    Yields:
        The path of the temporary folder.

    Raises:
        ValueError: As in `check_output_folder`, at the start and again before the folder is replaced.
        OSError: Likewise.
    """
    target = check_output_folder(path, replaceable=replaceable)
    directory, base = os.path.split(target)
    with locked(os.path.join(directory, f".{base}.lock"), f"The folder {target!r}", wait=True):
        clean_up(directory, base, replaceable)
        target = check_output_folder(path, replaceable=replaceable)
        with _swapping(target, replaceable) as temporary:
            yield temporary


@contextmanager
def _swapping(target: str, replaceable: Collection[str]) -> Iterator[str]:
    directory, base = os.path.split(target)
    temporary, old = (
        os.path.join(directory, unfinished_name(base, kind)) for kind in ("tmp", "old")
    )
    os.mkdir(temporary)
    try:
        take_mode(target, temporary)
        yield temporary
        check_output_folder(target, replaceable=replaceable)
        if os.path.exists(target):
            for entry in os.listdir(temporary):
                take_mode(os.path.join(target, entry), os.path.join(temporary, entry))
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
        delete_files(old, replaceable)


def atomic_save(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file; it appears only when it is complete.

    Equal contents give equal bytes. The file has the permissions of the file that it replaces, or of
    any new file.

    Raises:
        OSError: If the file cannot be written, as on a full disk.
    """
    with replacing(path) as temporary:
        create_as(path, temporary)
        mode = os.stat(temporary).st_mode
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(whole, temporary, metadata=dict(metadata))
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"Cannot write {os.fspath(path)!r}: {error}") from error
        _order_metadata(temporary)
        os.chmod(temporary, mode)  # safetensors lets only the owner read


def _order_metadata(path: str) -> None:
    """Sorts the metadata of a safetensors file, which are written in random order, in place."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))
