"""Lock a run directory, so that one process at a time writes into it.

The files of two processes would mix.  So the second process is refused, with a message that names the first.
The lock is a POSIX record lock: network file systems support it, the kernel releases it when the process is
killed, and a forked worker does not inherit it.  (``flock`` was tried: orphaned workers keep it.  A lock file
without a lock was tried: it survives ``kill -9``.)  The same process may lock a directory twice: a program
that resumes a run takes over from a monitor that was never closed, and the files count that as a new session.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import socket
import threading
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no locks there, so no process is refused
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


class DirectoryInUseError(OSError):
    """Raised if another process writes into this run directory; the message names it."""


# (Process id, directory) → lock file and its holders.  One descriptor for the whole process: closing any
# descriptor of a file releases all POSIX locks of the process on it.  The process id is a part of the key
# because a forked child holds no lock.  A file object, because it may be closed twice: Ctrl-C can interrupt a
# release anywhere, and the next one repeats it.
_HELD: dict[tuple[int, str], tuple[io.FileIO, set[int]]] = {}
_GUARD = threading.Lock()
_TOKENS = itertools.count()


class DirectoryLock:
    """Lock an existing directory. ``acquire`` and ``release`` may be called any number of times.

    ``acquire`` raises DirectoryInUseError if another process holds the lock, and OSError if the lock file
    cannot be written.  On a file system without locks, no process is refused.  The lock is also released when
    the object is deleted.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._token = next(_TOKENS)
        self._key: tuple[int, str] | None = None
        self._held: weakref.finalize[..., DirectoryLock] | None = None

    def acquire(self) -> None:
        if self._held is not None or fcntl is None:
            return
        key = self._key = os.getpid(), os.path.realpath(self._path)
        with _GUARD:
            if key not in _HELD:
                _HELD[key] = (io.FileIO(self._lock(), "r+"), set())
            _HELD[key][1].add(self._token)
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
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                try:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EAGAIN):
                        return descriptor  # this file system has no locks
                    raise self._refused(descriptor) from None
                # The last holder may have removed the file between open and lock.  Then the lock is on a file
                # without a name, and another process can make and lock a new one: try again.
                if _same(file, descriptor):
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
        return DirectoryInUseError(
            errno.EBUSY,
            f"{self._path} is in use: {who} writes a run into it. This run writes no files, and the training "
            "goes on. Pass another run_dir= to write files",
        )


def _release(key: tuple[int, str], token: int) -> None:
    if key[0] != os.getpid():
        return  # in a forked child: the parent holds the lock
    with _GUARD:
        if key not in _HELD:
            return
        lock, holders = _HELD[key]
        holders.discard(token)
        if not holders:
            file = Path(key[1], LOCK)
            with contextlib.suppress(OSError, ValueError):  # ValueError: closed already
                if _same(file, lock.fileno()):  # False if the directory was deleted and made again
                    file.unlink()
            lock.close()
            del _HELD[key]


def _same(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False
