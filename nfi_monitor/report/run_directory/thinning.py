"""Keep ``readings.jsonl`` within its budget: remove about every second reading of the older half.

Steps are divided into intervals of equal length, and the first reading of each interval stays; full readings
and readings of the loss alone are treated separately.  So recent readings keep their full resolution, and all
old readings have the same, coarser one.  (Removing every second line was tried: each pass halves the oldest
lines again, until the beginning of the run is gone.)  The first reading of each phase and of each session
stays: it says when the phase began, or where the run was resumed.  Alerts are in another file, and all stay.

The thinned file replaces the old one in one step (:mod:`nfi_monitor.atomic_write`).  (Numbered segments were
tried: every reader would have to know them, and could mix two generations.)
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
from nfi_monitor.safe_open import open_binary

READINGS_BYTES = 64 << 20
"""Size of ``readings.jsonl`` at which it is thinned, to about three quarters of it."""

# Both ends of a line, as the writer makes them; the numbers between them are not parsed.
_BEGIN = re.compile(rb'\{"step": (\d{1,16}), "phase": "(\w+)", "values": \{("loss": [^,}]*\})?')
_END = re.compile(rb'\}(?:, "session": (\d{1,9}))?\}\s*$')


def thin(path: Path) -> None:
    """Replace the file of readings by a thinner one. Raises OSError, and then leaves the file unchanged."""
    with replacing(path) as new, open_binary(path) as old:
        half = os.fstat(old.fileno()).st_size // 2
        every = [thinning_interval(np.array(steps, dtype=np.int64)) for steps in _steps(old, half)]
        old.seek(0)
        done, last = 0, None
        bucket: list[int | None] = [None, None]
        while done < half and (line := old.readline(1 << 20)):
            done += len(line)
            begin, end = _BEGIN.match(line), _END.search(line, max(0, len(line) - 40))
            if begin is None or end is None:  # torn, or from a newer version: keep it
                new.write(line)
                continue
            of, full = (begin[2], end[1]), begin[3] is None
            now = int(begin[1]) // every[full]
            if of != last or now != bucket[full]:
                new.write(line)
            last, bucket[full] = of, now
        shutil.copyfileobj(old, new, 1 << 20)


def _steps(file: BinaryIO, end: int) -> tuple[array[int], array[int]]:
    """Return the steps of the readings of the loss alone, and of the full ones, up to byte ``end``."""
    steps = (array("q"), array("q"))
    done = 0
    while done < end and (line := file.readline(1 << 20)):
        done += len(line)
        if begin := _BEGIN.match(line):
            steps[begin[3] is None].append(int(begin[1]))
    return steps
