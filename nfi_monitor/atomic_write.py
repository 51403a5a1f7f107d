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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write bytes into; it replaces ``path`` when the block ends.

    If the block raises, or the disk is full (OSError), ``path`` is unchanged and the new file is removed.
    """
    # With the process id in the name, two processes do not write into the same temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
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
