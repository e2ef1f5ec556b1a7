"""What a file takes over from the one that it replaces, and unfinished files of killed processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import stat
import time
import uuid
from collections.abc import Collection, Iterator

# Unfinished files whose writer cannot be asked for, as on another host, are left alone for so long.
_DAY = 24 * 3600.0
_MARK = r"(?:(?P<host>[0-9a-f]{8})-(?P<pid>[1-9]\d*)-[0-9a-f]{12}|[0-9a-f]{32})"


def writer_mark() -> str:
    """Returns a name part that is new, and says which process on which host is the writer."""
    return f"{_host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


def unfinished_name(base: str, kind: str) -> str:
    """Returns a new name for what will replace the file or folder `base`."""
    return f".{base}.{writer_mark()}.{kind}"


def leftovers(directory: str, base: str, kind: str) -> list[str]:
    """Returns paths from `unfinished_name` whose writers have ended, the newest last."""
    pattern = re.compile(rf"\.{re.escape(base)}\.{_MARK}\.{kind}")
    return _abandoned(directory, pattern)


def abandoned(directory: str, prefix: str) -> list[str]:
    """Returns the paths of a prefix and a `writer_mark` whose writers have ended."""
    return _abandoned(directory, re.compile(re.escape(prefix) + _MARK))


def marked(directory: str, prefix: str) -> list[str]:
    """Returns the paths of a prefix and a `writer_mark`, whether or not their writers have ended."""
    pattern = re.compile(re.escape(prefix) + _MARK)
    return [entry.path for entry in _entries(directory) if pattern.fullmatch(entry.name)]


@contextlib.contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Makes errors of the system, such as a full disk, say what failed, unless they name a file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None or what in str(error):
            raise
        raise type(error)(error.errno, f"{what}: {error.strerror}") from error


def remove(path: str) -> None:
    """Removes an unfinished file or folder, as far as that is possible."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def take_mode(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
    """Gives a new file or folder the permissions of the one that it replaces, if that exists."""
    try:
        before, now = os.stat(old), os.stat(new)
    except FileNotFoundError:
        return
    if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid) and hasattr(os, "chown"):
        with contextlib.suppress(OSError):  # only root can give files away
            os.chown(new, before.st_uid, before.st_gid)
    os.chmod(new, stat.S_IMODE(before.st_mode))


def create_as(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
    """Creates an empty file, which is no more readable than the one that it will replace."""
    try:
        mode = stat.S_IMODE(os.stat(old).st_mode) | stat.S_IRUSR | stat.S_IWUSR
    except FileNotFoundError:
        mode = 0o666  # as for any new file
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


def clean_up(directory: str, base: str, replaceable: Collection[str]) -> None:
    """Puts back what a process had moved away when it was killed, and removes what it left."""
    for left in reversed(leftovers(directory, base, "old")):
        if not os.path.lexists(os.path.join(directory, base)):
            os.rename(left, os.path.join(directory, base))
        elif not other_entries(left, replaceable):
            delete_files(left, replaceable)
    for left in leftovers(directory, base, "tmp"):
        remove(left)


def delete_files(folder: str, replaceable: Collection[str]) -> None:
    """Deletes a folder that holds only files of these names."""
    for name in replaceable:
        if os.path.isfile(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    os.rmdir(folder)


def same_file(first: str, second: str) -> bool:
    """Returns whether two absolute paths name one file."""
    if first == second:
        return True
    try:
        return os.path.samefile(first, second)  # hard links, and file systems that ignore case
    except OSError:
        return False


def contains(folder: str, path: str) -> bool:
    """Returns whether `path` is `folder` or lies in it; both are absolute."""
    try:
        return os.path.commonpath([folder, path]) == folder
    except ValueError:  # on different drives
        return False


def other_entries(folder: str, replaceable: Collection[str]) -> list[str]:
    """Returns the names of a folder's entries other than the files named in `replaceable`."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name not in replaceable or not entry.is_file(follow_symlinks=False)
        )


def _abandoned(directory: str, pattern: re.Pattern[str]) -> list[str]:
    found: list[tuple[float, str]] = []
    with contextlib.suppress(OSError):
        for entry in _entries(directory):
            match = pattern.fullmatch(entry.name)
            if match is None:
                continue
            with contextlib.suppress(OSError):  # removed meanwhile
                changed = entry.stat(follow_symlinks=False).st_mtime
                if _has_ended(match["host"], match["pid"], changed):
                    found.append((changed, entry.path))
    return [path for _, path in sorted(found)]


def _entries(directory: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        yield from entries


def _has_ended(host: str | None, pid: str | None, changed: float) -> bool:
    if host != _host() or pid is None or os.name != "posix":
        return time.time() - changed > _DAY
    try:
        os.kill(int(pid), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
