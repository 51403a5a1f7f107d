"""Keep ``readings.jsonl`` within its budget: old readings get sparser.

Of the older half about every second reading goes: what stays is the first of every so many steps, full
readings and those of the loss alone counted apart.  So the recent past keeps its full resolution and all of
the distant past the same, coarser one.  (Dropping every second line lost: pass after pass halves the oldest
again, until nothing of a run's beginning is left.)  The first reading of a phase and of a session stays.
They say when phases began and where a run was resumed.  Alerts have a file of their own: none is removed.

The thinned file takes the old one's place at once (:mod:`nfi_monitor.atomic_write`).  (Numbered segments lost:
every reader would have to know them, and one that opens them in turn would mix two generations.)
"""

from __future__ import annotations

import os
import re
import shutil
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nfi_monitor.atomic_write import replacing
from nfi_monitor.history import thinning_interval

READINGS_BYTES = 64 << 20
"""Size of ``readings.jsonl`` at which it is thinned, to about three quarters."""

# Both ends of a line, as the writer makes them: what is between need not be looked at.
_BEGIN = re.compile(rb'\{"step": (-?\d+), "phase": "(\w+)", "values": \{("loss": [^,}]*\})?')
_END = re.compile(rb'\}(?:, "session": (\d+))?\}\s*$')


def thin(path: Path) -> None:
    """Replace the file of readings by a thinner one. Raises OSError, the file being as it was."""
    with replacing(path) as new, open(path, "rb") as old:
        half = os.fstat(old.fileno()).st_size // 2
        every = [thinning_interval(np.array(steps, dtype=np.int64)) for steps in _steps(old, half)]
        old.seek(0)
        done, last = 0, None
        bucket: list[int | None] = [None, None]
        while done < half and (line := old.readline()):
            done += len(line)
            begin, end = _BEGIN.match(line), _END.search(line, max(0, len(line) - 40))
            if begin is None or end is None:  # torn, or a newer version's: not ours to judge
                new.write(line)
                continue
            of, full = (begin[2], end[1]), begin[3] is None
            now = int(begin[1]) // every[full]
            if of != last or now != bucket[full]:
                new.write(line)
            last, bucket[full] = of, now
        shutil.copyfileobj(old, new, 1 << 20)


def _steps(file: BinaryIO, end: int) -> tuple[array[int], array[int]]:
    """The steps of the readings of the loss alone, and of the full ones, up to byte ``end``."""
    steps = (array("q"), array("q"))
    done = 0
    while done < end and (line := file.readline()):
        done += len(line)
        if begin := _BEGIN.match(line):
            steps[begin[3] is None].append(int(begin[1]))
    return steps
