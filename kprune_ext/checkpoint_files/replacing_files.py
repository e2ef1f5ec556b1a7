"""Saving of checkpoints that appear completely or not at all.

New files are written into a hidden folder inside the checkpoint's own, and are renamed into place once
all are complete. An error, or a kill while weights are written, leaves the previous files. Only a kill
between two of the final renames, which move no data, can mix two checkpoints; for weights in one
file that is either harmless or refused on loading, as sizes then differ.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..files.locks import locked
from ..files.replacement import abandoned, marked, named_errors, remove, take_mode, writer_mark
from ..files.writing import resolved

_UNFINISHED = ".kprune-unfinished-"
_LOCK = ".kprune-lock"
_WEIGHTS = re.compile(
    r"model(?:\.(?P<variant>(?!safetensors)[^.]+?))?"
    r"(?:-\d{5}-of-\d{5})?\.safetensors(?P<index>\.index\.(?:[^.]+\.)?json)?"
)


@contextmanager
def replacing_files(
    folder: str | os.PathLike[str], replaceable: Iterable[str] = ()
) -> Iterator[Path]:
    """Yields an empty folder whose files move into `folder` if the block ends without an error.

    Files of other names in `folder` are kept, except weights that the new ones replace: old shards, or
    the single file if the new weights are in shards. If another process or thread is saving to the
    folder, this waits until it is done: the last one's files stay. New files have the permissions of
    those that they replace.

    Args:
        folder: Folder of the checkpoint; created if necessary, and removed again after an error.
        replaceable: Names of files that are removed if no new file replaces them.

    Yields:
        The folder to write to.

    Raises:
        NotADirectoryError: If `folder` is a file.
        ValueError: If the name is empty.
        OSError: If the files cannot be written, as on a full disk.
    """
    target = Path(resolved(folder, "save_directory"))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(
            f"Cannot save to {os.fspath(folder)!r}: it is a file. Pass the name of a folder."
        )
    made = [path for path in (target, *target.parents) if not path.exists()]
    done, what = False, f"Cannot save to {os.fspath(folder)!r}"
    try:
        with (
            named_errors(what),
            locked(str(target / _LOCK), f"The folder {os.fspath(folder)!r}", wait=True) as alone,
        ):
            _clean_up(target, alone)
            with _unfinished(target) as (new, old):
                yield new
                _put_in_place(new, old, target, set(replaceable))
        done = True
    except SafetensorError as error:
        raise OSError(f"{what}: {error}") from error
    finally:
        if not done:
            for path in made:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()


@contextmanager
def _unfinished(target: Path) -> Iterator[tuple[Path, Path]]:
    """Yields folders for the new files and for links to the old ones."""
    unfinished = target / f"{_UNFINISHED}{writer_mark()}"
    new, old = unfinished / "new", unfinished / "old"
    try:
        new.mkdir(parents=True)
        old.mkdir()
        yield new, old
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _clean_up(target: Path, alone: bool) -> None:
    """Removes what saves that were killed have left; alone, there is no other."""
    found = marked if alone else abandoned
    for name in found(str(target), _UNFINISHED):
        remove(name)


def _put_in_place(new: Path, old: Path, target: Path, replaceable: set[str]) -> None:
    names = sorted(path.name for path in new.iterdir())
    present = {path.name for path in target.iterdir() if path.is_file()}
    stale = (replaceable & present) - set(names) | _stale_weights(present, set(names))
    placed: list[str] = []
    old_weights = sorted(name for name in stale if _variant(name))
    for name in names:
        before = name if name in present or not _variant(name) else next(iter(old_weights), name)
        take_mode(target / before, new / name)
    for name in (present & set(names)) | stale:
        _keep(target / name, old / name)
    try:
        for name in names:
            os.replace(new / name, target / name)
            placed.append(name)
        for name in stale:
            os.remove(target / name)
    except BaseException:
        _put_back(old, target, [name for name in placed if name not in present])
        raise


def _put_back(old: Path, target: Path, added: Iterable[str]) -> None:
    """Undoes the renames. If that fails as well, the only copies of the old files are not deleted."""
    try:
        for name in added:
            os.remove(target / name)
        for path in old.iterdir():
            os.replace(path, target / path.name)
    except BaseException as error:
        rescued = target / f"previous-files-{writer_mark()}"
        os.rename(old, rescued)
        raise OSError(
            f"Cannot save to {str(target)!r}, nor put back all files that were there: {error}. What is "
            f"missing is in {str(rescued)!r}. Move it back before you use the folder."
        ) from error


def _keep(path: Path, second: Path) -> None:
    """Links a file under a second name, or copies it if the file system has no links."""
    try:
        os.link(path, second)
    except OSError:
        shutil.copy2(path, second)


def _stale_weights(present: set[str], names: set[str]) -> set[str]:
    written = {variant for name in names for variant in _variant(name)}
    return {name for name in present - names if written & set(_variant(name))}


def _variant(name: str) -> list[str]:
    """Returns the variant of a weights file (empty for the default one), or [] for other files."""
    match = _WEIGHTS.fullmatch(name)
    if match is None:
        return []
    return [match["variant"] or re.sub(r"^\.index\.|\.?json$", "", match["index"] or "")]
