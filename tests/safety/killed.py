"""Processes that write a run directory and die in the middle of it, for test_storage.py.

Forked, not started anew: two hundred of them take seconds.  Every reading's values follow from its step, so
that whoever reads the directory can tell a right record from a wrong one.
"""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from nfi_monitor.report.run_directory.writer import RunDirectory
from nfi_monitor.types import (
    Alert,
    AlertKind,
    AlertState,
    Change,
    Evidence,
    Mechanism,
    Note,
    Phase,
    Reading,
    Severity,
)  # fmt: skip

LASTS = 25
"""Readings of one phase, and so of one alert."""


def reading_of(step: int) -> tuple[Reading, Phase]:
    """Every fifth is a full one."""
    values = {"loss": 1.0 / step}
    if step % 5 == 0:
        values |= {"zero_sum_violation": (step % 97) / 97, "update_rms": step * 1e-7}
    return Reading(step, values), Phase.ABSORBING if step // LASTS % 2 else Phase.HEALTHY


def alert_of(step: int) -> tuple[Alert, Change] | None:
    """One begins and ends with each phase that is not healthy."""
    if step % LASTS or step < LASTS:
        return None
    number, over = divmod(step // LASTS - 1, 2)
    alert = Alert(
        id=f"at_risk-{number}",
        kind=AlertKind.AT_RISK,
        severity=Severity.INFO,
        state=AlertState.RESOLVED if over else AlertState.FIRING,
        phase=reading_of(step)[1],
        first_step=(2 * number + 1) * LASTS,
        last_step=step,
        mechanism=Mechanism.NUMERICAL_FEATURE_INFLATION,
        confidence=0.5,
        evidence={"zero_sum_violation_smoothed": Evidence(value=1.0 / step, threshold=0.1)},
        advice=("Compute the loss in float64.",),
        layer="κεφαλή",
    )
    return alert, Change.END if over else Change.BEGIN


def write(directory: Path, budget: int, first: int, done: Callable[[int], None]) -> None:
    """Readings, alerts and notes from step ``first`` on, until it is killed; ``done(step)`` after each."""
    sink = RunDirectory(directory, readings_bytes=budget)
    sink.start({"model": "Test", "run_dir": str(directory)})
    for step in itertools.count(first):
        sink.reading(*reading_of(step))
        told = alert_of(step)
        if told is not None:
            sink.alert(*told)
        done(step)
        if step % 40 == 0:
            sink.note(Note(f"note-{step // 40 % 5}", "something", step))


class Child:
    """A forked process that runs ``work(done)``; ``done(step)`` is seen here at once."""

    def __init__(self, work: Callable[[Callable[[int], None]], None]) -> None:
        self._shared = mmap.mmap(-1, 8)
        self._read, written = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(written)
            return
        code = 1
        try:
            os.close(self._read)
            try:
                work(self._done)
                code = 0
            except BaseException:
                os.write(written, traceback.format_exc().encode())
        finally:
            os._exit(code)  # no exit handler of the parent's, no test that goes on twice

    def _done(self, step: int) -> None:
        self._shared[:] = step.to_bytes(8, "little")

    @property
    def done(self) -> int:
        return int.from_bytes(self._shared[:], "little")

    def kill(self, after: float, *, begun: bool = False) -> None:
        """``kill -9`` after so many seconds, or so many after its first step; 10 s at most."""
        end = time.monotonic() + 10
        while begun and not self.done and time.monotonic() < end:
            time.sleep(0.0005)
        time.sleep(after)
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> str:
        """Until it ends; the traceback of what it raised, or ""."""
        with os.fdopen(self._read) as pipe:
            said = pipe.read()
        os.waitpid(self.pid, 0)
        return said


def limit_file_size(limit: int) -> None:
    """In a child: no file may grow beyond ``limit`` bytes. What crosses it is written in part, and the next
    write fails: what a full disk does, done by the kernel."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
