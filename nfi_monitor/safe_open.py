"""Open files of a run directory: regular files only, and never through a link.

A run directory may come from somebody else, or lie in a folder that others write to.  A FIFO there would stop
the reader forever, a device could do anything, and a link would lead out of the directory.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = (
    (stat.S_ISLNK, "a link", errno.ELOOP),
    (stat.S_ISDIR, "a directory", errno.EISDIR),
    (stat.S_ISFIFO, "a FIFO", errno.EINVAL),
    (stat.S_ISSOCK, "a socket", errno.EINVAL),
    (stat.S_ISCHR, "a device", errno.EINVAL),
    (stat.S_ISBLK, "a device", errno.EINVAL),
)
# Non-blocking: another process may put a FIFO there after the check. Windows has neither flag.
_CAREFULLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError if something other than a regular file has this name. Opens nothing.

    Raises FileNotFoundError if there is nothing.
    """
    _check(os.lstat(path).st_mode, path)


def open_descriptor(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """Open a regular file with the ``flags`` of :func:`os.open`, and return its descriptor.

    Raises OSError, with what is there, for everything that is no regular file; else as :func:`os.open` does.
    """
    try:
        check_regular(path)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    descriptor = os.open(path, flags | _CAREFULLY, 0o666)
    try:
        _check(os.fstat(descriptor).st_mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_binary(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading bytes. Raises as :func:`open_descriptor`."""
    return os.fdopen(open_descriptor(path), "rb")


def identity(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Return device, number and kind of what has this name, or None if there is nothing. Follows no link.

    The kind: the number of a removed file may be that of the next one.
    """
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, stat.S_IFMT(found.st_mode)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the path of a run directory: ``~`` expanded, absolute, and with its links resolved.

    Later changes of the working directory, or of a link such as ``runs/latest``, do not move the run.
    """
    path = os.path.expanduser(path)
    try:
        return Path(os.path.realpath(path))
    except OSError:  # the working directory was removed: making the run directory will say so
        return Path(path)


def _check(mode: int, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(mode):
        found = (one[1:] for one in _KINDS if one[0](mode))
        kind, code = next(found, ("something else", errno.EINVAL))
        raise OSError(code, f"it is {kind}, not a regular file", os.fspath(path))
