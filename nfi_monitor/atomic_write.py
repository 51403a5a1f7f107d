"""Replace a file as a whole: whoever opens it, even after a crash, finds the old one or the new one.

The new one is written beside it (a rename across file systems is a copy, and can be torn) and reaches the
disk before it takes the name: else a power cut may leave the name on an empty file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes into, that is found at ``path`` once the block has ended.

    Where the block raises, or the disk is full (OSError), ``path`` is as it was, with nothing left beside it.
    """
    # The process's number: two that write one file at once each replace it by a whole one.
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
    """What processes left that were killed while they replaced ``path``."""
    for file in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            file.unlink()
