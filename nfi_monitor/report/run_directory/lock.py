"""One process at a time writes into a run directory.

Two that write into one would give a record of neither, so the second is refused, and told who holds it.  A
POSIX record lock: network file systems honour it, the kernel drops it with the process that was killed, and a
forked worker does not inherit it.  (``flock`` lost: orphaned workers would hold it.  A file that is the lock
by being there lost: it outlives a ``kill -9``.)  Within one process nobody is refused: what resumes a run in
the same program takes over from a monitor that was never closed, and the record counts that as a session.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nobody is refused there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


class DirectoryInUseError(OSError):
    """Another process writes into this run directory; the message says which."""


# (Process, directory) → descriptor and how many hold it.  One for the process: closing any descriptor of a
# file gives up all of the process's POSIX locks on it.  With its id: a forked child holds nothing.
_HELD: dict[tuple[int, str], tuple[int, int]] = {}
_GUARD = threading.Lock()


class DirectoryLock:
    """``acquire`` and ``release`` may be called any number of times; the directory has to exist.

    Raises DirectoryInUseError where another process holds it, OSError where nothing can be written.
    Where the file system has no locks, nobody is refused.  Released with the object, too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._held: weakref.finalize[..., DirectoryLock] | None = None

    def acquire(self) -> None:
        if self._held is not None or fcntl is None:
            return
        key = os.getpid(), os.path.realpath(self._path)
        with _GUARD:
            descriptor, holders = _HELD.get(key, (-1, 0))
            if descriptor < 0:
                descriptor = self._lock()
            _HELD[key] = (descriptor, holders + 1)
        self._held = weakref.finalize(self, _release, key)

    def release(self) -> None:
        """The last holder of this process removes the file."""
        held, self._held = self._held, None
        if held is not None:
            held()

    def _lock(self) -> int:
        file = self._path / LOCK
        while True:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                try:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EAGAIN):
                        return descriptor  # no locks here
                    raise self._refused(descriptor) from None
                # Who held it may have removed the file between open and lock: then somebody else may make and
                # lock another one.
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
            f"{self._path} is being written by {who}: two runs in one directory would be a record of "
            "neither. Pass a run_dir= of its own to each; the training goes on, without files",
        )


def _release(key: tuple[int, str]) -> None:
    if key[0] != os.getpid():
        return  # a forked child: the lock is its parent's
    with _GUARD:
        descriptor, holders = _HELD.pop(key, (-1, 0))
        if holders > 1:
            _HELD[key] = (descriptor, holders - 1)
        elif descriptor >= 0:
            file = Path(key[1], LOCK)
            with contextlib.suppress(OSError):
                if _same(file, descriptor):  # not where the directory was made anew by somebody else
                    file.unlink()
            os.close(descriptor)


def _same(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False
