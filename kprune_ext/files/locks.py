"""Locks on folders between processes and threads, and on models between threads.

A lock on a folder is a lock of the operating system on a file. A process that ends, even by a kill,
therefore never holds one any longer, and a process that was forked does not inherit it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import threading
import time
from collections.abc import Iterator

from torch import nn

try:
    import fcntl
except ImportError:  # Windows: there is no lock between processes, only between threads
    fcntl = None  # type: ignore[assignment]

_POLL_SECONDS = 0.05
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class _Held:
    """What the threads of this process hold."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.paths: set[str] = set()
        self.modules: dict[int, str] = {}


_held = _Held()


def _forget() -> None:
    """A forked process holds nothing, and no thread of it can release what the parent held."""
    global _held
    _held = _Held()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def locked(path: str, what: str, wait: bool) -> Iterator[bool]:
    """Holds the lock file `path` while the block runs, and removes it at the end.

    Args:
        path: Absolute path of the lock file. Its folder is created if it does not exist.
        what: What the lock stands for, for the message.
        wait: Whether to wait until the lock is free.

    Yields:
        Whether other processes are kept out, which not every system and file system can do.

    Raises:
        BlockingIOError: If the lock is held by another process or thread, and `wait` is False.
    """
    held, owner = _held, os.getpid()
    with held.changed:
        while path in held.paths:
            if not wait:
                raise _in_use(what, f"another thread of this process ({owner})")
            held.changed.wait()
        held.paths.add(path)
    descriptor = None
    try:
        descriptor = _opened(path, what, wait)
        yield descriptor is not None
    finally:
        if os.getpid() == owner:  # else a fork of the holder leaves the block
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                os.close(descriptor)
            with held.changed:
                held.paths.discard(path)
                held.changed.notify_all()


def _opened(path: str, what: str, wait: bool) -> int | None:
    """Returns the descriptor of the locked file; None where files cannot be locked."""
    while fcntl is not None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the last holder has just removed the folder
            continue
        except OSError as error:
            if error.errno in _NOT_ALLOWED:  # finished work can still be read there
                return None
            raise
        keep = False
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            keep = _is_still(path, descriptor)
            if keep:
                _sign(descriptor)
                return descriptor
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
            if not wait:
                raise _in_use(what, os.pread(descriptor, 200, 0).decode(errors="replace")) from None
            time.sleep(_POLL_SECONDS)
        finally:
            if not keep:
                os.close(descriptor)
    return None


def _is_still(path: str, descriptor: int) -> bool:
    """Whether the path names the open file, and not a newer one after the last holder's removal."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a full disk: only the message lacks the holder's name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)


def _in_use(what: str, holder: str) -> BlockingIOError:
    return BlockingIOError(
        errno.EAGAIN,
        f"{what} is in use by {holder or 'another process'}. Wait until it has ended, or give "
        "another folder.",
    )


@contextlib.contextmanager
def only_user_of(model: nn.Module, use: str) -> Iterator[None]:
    """Keeps other threads from working on the same model, or one with the same modules.

    The mode and the hooks of a model hold for every thread that runs it, so that two would disturb each
    other's results.

    Args:
        model: The model.
        use: What is done to it, for the message of the other threads.

    Raises:
        RuntimeError: If another thread works on it.
    """
    held = _held
    own = {id(module): use for module in model.modules()}
    with held.changed:
        other = next((held.modules[key] for key in own if key in held.modules), None)
        if other is not None:
            raise RuntimeError(
                f"The model is in use by {other} in another thread of this process, and {use} would "
                "change its result. Run them one after the other, or give each a copy of the model."
            )
        held.modules.update(own)
    try:
        yield
    finally:
        with held.changed:
            for key in own:
                held.modules.pop(key, None)
