"""Replace a file atomically: a reader, even after a crash, finds either the old file or the new one.

The new file is written into the same directory, because a rename across file systems is a copy, which a crash
can interrupt. It is flushed to the disk before the rename: otherwise a power failure could leave an empty
file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from nfi_monitor.safe_open import check_regular, open_descriptor


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write bytes into; it replaces ``path`` when the block ends.

    If the block raises, or the disk is full (OSError), ``path`` is unchanged and the new file is removed.
    A link is replaced itself: what it leads to stays.  Raises OSError if ``path`` is a FIFO, a directory or
    anything else that is no regular file.
    """
    # With the process id in the name, two processes do not write into the same temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            check_regular(path)
    with contextlib.suppress(FileNotFoundError):  # of a process that had the same id and was killed
        temporary.unlink()
    try:
        with open(temporary, "xb", opener=open_descriptor) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they replaced ``path``."""
    for file in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            file.unlink()
