"""Lock a run directory, so that one process at a time writes into it.

The files of two processes would mix.  So the second process is refused, with a message that names the first.
The lock is a POSIX record lock: network file systems support it, the kernel releases it when the process is
killed, and a forked worker does not inherit it.  (``flock`` was tried: orphaned workers keep it.  A lock file
without a lock was tried: it survives ``kill -9``.)  Two monitors of one process cannot share a directory
either.  A program that writes with sinks of its own may take over from a sink that was never closed, and the
files count that as a new session.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import itertools
import os
import socket
import threading
import weakref
from pathlib import Path

from nfi_monitor.safe_open import absolute, open_descriptor

try:
    import fcntl
except ImportError:  # Windows: no locks there, so no process is refused
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


class DirectoryInUseError(OSError):
    """Raised if another process or another monitor writes into this run directory; the message names it."""


class _Held:
    """One lock of this process: its file, and the owner of each holder."""

    def __init__(self, descriptor: int) -> None:
        # One descriptor for the whole process: closing any descriptor of a file releases all POSIX locks of
        # the process on it.  A file object, because it may be closed twice: Ctrl-C can interrupt a release
        # anywhere, and the next one repeats it.
        self.file = io.FileIO(descriptor, "r+")
        self.owners: dict[int, object] = {}

    def refuses(self, owner: object) -> bool:
        return owner is not None and any(other not in (None, owner) for other in self.owners.values())


# The process id is a part of the key because a forked child holds no lock.
_HELD: dict[tuple[int, str], _Held] = {}
_GUARD = threading.RLock()  # the garbage collector may release a lock while another one is acquired
_TOKENS = itertools.count()


class DirectoryLock:
    """Lock an existing directory. ``acquire`` and ``release`` may be called any number of times.

    ``acquire`` raises DirectoryInUseError if another process holds the lock, or another ``owner`` of this
    process, and OSError if the lock file cannot be written.  The sinks of one monitor have one owner.  None
    shares the directory with every owner of this process.  On a file system without locks, no process is
    refused.  The lock is also released when the object is deleted.
    """

    def __init__(self, path: str | os.PathLike[str], owner: object = None) -> None:
        self._path = absolute(path)
        self._owner = owner
        self._token = next(_TOKENS)
        self._key: tuple[int, str] | None = None
        self._held: weakref.finalize[..., DirectoryLock] | None = None

    def acquire(self) -> None:
        if self._held is not None or fcntl is None:
            return
        key = self._key = os.getpid(), os.path.realpath(self._path)
        with _GUARD:
            if key in _HELD and _HELD[key].refuses(self._owner):
                gc.collect()  # a monitor that nothing holds any more is no longer open
            held = _HELD.get(key)
            if held is None:
                held = _HELD[key] = _Held(self._lock())
            elif held.refuses(self._owner):
                raise self._in_use(
                    "another open monitor of this process", "Close that monitor first, or pass"
                )
            held.owners[self._token] = self._owner
        self._held = weakref.finalize(self, _release, key, self._token)

    def release(self) -> None:
        """Release the lock; the last holder in this process removes the lock file."""
        if self._key is not None and self._held is None:
            with contextlib.suppress(OSError):  # acquire() was interrupted, and may have left its file
                self.acquire()
        if self._key is not None:
            _release(self._key, self._token)
        if self._held is not None:
            self._held.detach()
        self._key = self._held = None

    def _lock(self) -> int:
        file = self._path / LOCK
        while True:
            descriptor = open_descriptor(file, os.O_RDWR | os.O_CREAT)
            try:
                try:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EAGAIN):
                        return descriptor  # this file system has no locks
                    raise self._refused(descriptor) from None
                # The last holder may have removed the file between open and lock.  Then the lock is on a file
                # without a name, and another process can make and lock a new one: try again.
                if os.fstat(descriptor).st_nlink > 1:  # never write into a file that has another name
                    file.unlink()
                elif _same(file, descriptor):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}".encode())
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _refused(self, descriptor: int) -> DirectoryInUseError:
        pid, _, host = os.read(descriptor, 300).decode("utf-8", "replace").partition(" ")
        who = f"process {pid} on {host}" if pid.isdigit() else "another process"
        return self._in_use(who, "Pass")

    def _in_use(self, who: str, advice: str) -> DirectoryInUseError:
        return DirectoryInUseError(
            errno.EBUSY,
            f"{self._path} is in use: {who} writes a run into it. This run writes no files, and the training "
            f"goes on. {advice} another run_dir= to write files",
        )


def _release(key: tuple[int, str], token: int) -> None:
    if key[0] != os.getpid():
        return  # in a forked child: the parent holds the lock
    with _GUARD:
        held = _HELD.get(key)
        if held is None:
            return
        held.owners.pop(token, None)
        if not held.owners:
            file = Path(key[1], LOCK)
            with contextlib.suppress(OSError, ValueError):  # ValueError: closed already
                if _same(file, held.file.fileno()):  # False if the directory was deleted and made again
                    file.unlink()
            held.file.close()
            del _HELD[key]


def _same(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False
